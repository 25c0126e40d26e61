"""What an activation quantiser works with: the clips for one forward, and the two forms of its result."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ForwardClips(NamedTuple):
    """Clips to quantise the input of one forward with; each is 0-dim."""

    clip_max: Tensor
    clip_min: Tensor
    prev_clip_max: Tensor
    prev_clip_min: Tensor
    is_state: bool  # of the quantiser, so the effective clips of a forward are written back


class FakeQuantized(NamedTuple):
    """A fake-quantised activation and what its gradient is computed from."""

    y: Tensor
    x: Tensor
    clip_max: Tensor  # effective clips, as the op returned them
    clip_min: Tensor


class QuantizedActivation(NamedTuple):
    """An activation as codes, and what its readers need for their gradients."""

    proxy: Tensor  # takes the place of the fake-quantised activation in the autograd graph; its values are undefined
    x: Tensor
    clip_max: Tensor  # effective clips
    clip_min: Tensor
    codes: Tensor
    scale: Tensor
    offset: Tensor
    num_bits: int
