"""2:4 sparsity of one weight, held as state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.cached_item import VersionGuard
from amct_ext.layers.forward_context import state_updates_disabled


def masked(weight: Tensor, mask: Tensor | None, decay: float | None = None) -> Tensor:
    """The masked weight (without a mask the weight itself); ``decay``: that of SR-STE, None for a masked gradient."""
    if mask is None:
        return weight
    return ops.apply_mask(weight, mask) if decay is None else ops.apply_mask_sr_ste(weight, mask, decay)


class Sparsity(nn.Module):
    """Masks a weight so that at most two of every four neighbours along its input-channel axis stay.

    State: ``mask`` (bool, shape of the weight) and ``step`` (int64, training forwards so far).

    * The mask is made at construction. A training forward renews it when ``step == 0`` (``update_freq == 0``) or
      ``step % update_freq == 0``. Evaluation never does, nor does a forward that gradient checkpointing runs again.
    * The dense weight is kept, so a renewal can revive a masked element.
    * Masked elements get a zero gradient, or with ``decay`` that of SR-STE: as if they were not masked, and a pull
      towards zero.
    * A mask that was written from elsewhere and keeps more than two of four is made again: averaging models gives the
      union of their masks.

    Sources: AMCT's L1 selective pruning (M4N2); Zhou et al. 2021 (SR-STE).
    """

    mask: Tensor
    step: Tensor

    def __init__(self, weight: Tensor, axis: int, update_freq: int, decay: float | None = None) -> None:
        super().__init__()
        self.decay = decay
        self.axis = axis
        self.update_freq = update_freq
        self.register_buffer("mask", ops.mask_2to4(weight.detach(), axis))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=weight.device))
        # Guards a mask known to be 2:4. A renewal here raises no version, so another version was written elsewhere.
        self._valid_mask = VersionGuard()
        self._valid_mask.remember(self.mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight, renewing the mask first where that is due."""
        return masked(weight, self.mask_for_forward(weight), self.decay)

    def mask_for_forward(self, weight: Tensor) -> Tensor:
        """The mask of this forward: a training forward counts, and renews it where that is due."""
        if not state_updates_disabled():
            self.repair_mask(weight)
            if self.training:
                ops.refresh_mask_(weight.detach(), self.mask, self.step, self.update_freq, self.axis)
        return self.mask

    @torch.no_grad()
    def repair_mask(self, weight: Tensor) -> None:
        """Make the mask from ``weight`` again where one that is not 2:4 was written; decided on the device."""
        if torch.compiler.is_compiling() or self.mask.device.type == "meta" or self._valid_mask.unchanged(self.mask):
            return
        kept = ops.mask_2to4(self.mask.to(torch.float32), self.axis)
        is_2to4 = (kept | ~self.mask).all()
        self.mask.copy_(torch.where(is_2to4, self.mask, ops.mask_2to4(weight.detach(), self.axis)))
        self._valid_mask.remember(self.mask)

    def extra_repr(self) -> str:
        decay = "" if self.decay is None else f", SR-STE with decay={self.decay}"
        return f"axis={self.axis}, update_freq={self.update_freq}{decay}"
