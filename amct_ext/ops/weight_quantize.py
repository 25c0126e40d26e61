"""The integer codes of a weight, for export."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from amct_ext.ops._registration import reference
from amct_ext.ops.weight_arq import to_codes
from amct_ext.ops.weight_lsq import check_scaled, positive_along_channels

__all__ = ["quantize_weight"]


def quantize_weight(w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> Tensor:
    """The integer codes of a weight, as int8.

    Args: as `lsq_fake_quantize`; num_bits 2 to 8.

    Returns: int8 tensor with the shape of w; round half to even, clamped to the code range. NaN gives 0.

    Errors: TypeError, ValueError (num_bits, number of scales), IndexError (channel_axis).

    Source: AMCT's export of quantised weights.

        >>> quantize_weight(torch.tensor([0.5, -1.5, 300.0]), torch.tensor([1.0])).tolist()
        [0, -2, 127]
    """
    return torch.ops.amct_ext.quantize_weight(w, scale, num_bits, channel_axis)


def _empty(w: Tensor, **_: object) -> Tensor:
    return torch.empty_like(w, dtype=torch.int8)


@reference("quantize_weight", check=partial(check_scaled, max_bits=8), empty=_empty)
def quantize_weight_reference(w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> Tensor:
    shaped = positive_along_channels(scale, w, channel_axis)
    return to_codes(w.to(shaped.dtype), shaped, num_bits).nan_to_num(0.0).to(torch.int8)
