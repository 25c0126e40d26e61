"""Whether a tensor holds what it held: also after writes that autograd does not count, those through ``.data``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fingerprint(tensor: Tensor, pieces: int | None = None) -> tuple[Any, ...]:
    """What two looks at a CPU tensor have in common where nothing was written between them.

    Writes that raise the version count always. Others show in the bits of the tensor: of all of it, or of so many
    pieces of 64 bytes, spread evenly. Then an exchange of the tensor shows, that of a few values perhaps not.
    """
    from amct_ext import _C

    version = 0 if tensor.is_inference() else tensor._version
    memory = tensor.t() if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
    if not (memory.is_contiguous() or (memory.dim() == 4 and memory.is_contiguous(memory_format=torch.channels_last))):
        memory = memory.contiguous()
    size = memory.numel() * memory.element_size()
    bits = _C.fingerprint(memory.data_ptr(), size, size if pieces is None else pieces)
    return id(tensor), tensor.data_ptr(), version, bits
