"""The accumulators of a layer on the device: whole multiples of its dequantisation scale, bias and BatchNorm included.

The shift search asks for round(y / deq_scale), y being the output behind a folded BatchNorm. Floats give that up to
their rounding. Where the product is one of codes the integers are there: its sums, with the sign of the BatchNorm's
factor, and what bias and BatchNorm add, rounded to a multiple as the deploy file has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amct_ext.common.ranks import whole
from amct_ext.layers.bn_fold import factor_sign, fold_batch_norm


@torch.no_grad()
def device_accumulators(layer: Any, sums: Tensor, deq_scale: Tensor, channel_axis: int) -> Tensor:
    """The accumulators as float64, which holds them exactly, saturated to 32 bits.

    ``sums``: int32, of the layer's product of codes; ``deq_scale``: its `deq_scale()`. A channel whose scale is not
    positive holds NaN or nothing of meaning.
    """
    shape = [1] * sums.dim()
    shape[channel_axis] = -1
    total = sums.double()
    bias = None if layer.bias is None else whole(layer.bias).double()
    norm = layer.refs.batch_norm
    if norm is not None:
        weight, shift = (p if p is None else whole(p) for p in (norm.weight, norm.bias))
        factor, bias = fold_batch_norm(bias, weight, shift, norm.running_mean, norm.running_var, norm.eps)
        total *= factor_sign(layer.weight_quant.last_scale().double(), factor).view(shape)
    if bias is not None:
        total += (bias / deq_scale.double()).round_().view(shape)
    limits = torch.iinfo(torch.int32)
    return total.clamp_(limits.min, limits.max)
