"""The integer codes of a weight, for export."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._common import (
    FLT_EPSILON,
    accumulate_type,
    along_channels,
    reference,
)
from amct_ext.ops.weight_arq import codes
from amct_ext.ops.weight_lsq import check_scaled


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


@reference("quantize_weight")
def _reference_quantize(w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> Tensor:
    check_scaled("quantize_weight", w, scale, num_bits, channel_axis, most=8)
    wide = w.to(accumulate_type(w))
    shaped = along_channels(scale.to(wide.dtype).clamp_min(FLT_EPSILON), w, channel_axis)
    return codes(wide, shaped, num_bits).nan_to_num(0.0).to(torch.int8)
