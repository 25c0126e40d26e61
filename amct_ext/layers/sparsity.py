"""2:4 sparsity of one weight, held as state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amct_ext import ops


class Sparsity(nn.Module):
    """Masks a weight so that at most two of every four neighbours along its input-channel axis stay.

    State: ``mask`` (bool, shape of the weight) and ``step`` (int64, training forwards so far). The mask is made at
    construction; a training forward renews it when ``step == 0`` (``update_freq == 0``) or ``step % update_freq ==
    0``; evaluation never does. The dense weight is kept, so a renewal can revive a masked element; masked elements get
    a zero gradient. Source: AMCT's L1 selective pruning (M4N2).
    """

    mask: Tensor
    step: Tensor

    def __init__(self, weight: Tensor, axis: int, update_freq: int) -> None:
        super().__init__()
        self.axis = axis
        self.update_freq = update_freq
        self.register_buffer("mask", ops.mask_2to4(weight.detach(), axis))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight, renewing the mask first where that is due."""
        return ops.apply_mask(weight, self.present_mask(weight))

    def present_mask(self, weight: Tensor) -> Tensor:
        """The mask of this forward: a training forward counts, and renews it where that is due."""
        if self.training:
            ops.refresh_mask_(weight.detach(), self.mask, self.step, self.update_freq, self.axis)
        return self.mask

    def extra_repr(self) -> str:
        return f"axis={self.axis}, update_freq={self.update_freq}"
