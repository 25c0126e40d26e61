"""The accumulators of a layer on the device: whole multiples of its dequantisation scale, bias and BatchNorm included.

The shift search asks for round(y / deq_scale), y being the output behind a folded BatchNorm. Computed from floats it
has their rounding errors. The integer product has the exact sums. They take the sign of the BatchNorm's factor; what
bias and BatchNorm add is rounded to a multiple of the scale, as in the deploy file.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from amct_ext.common.ranks import full_tensor
from amct_ext.layers.bn_fold import affine, factor_sign, fold_batch_norm


@torch.no_grad()
def device_accumulators(
    sums: Tensor,
    bias: Tensor | None,
    norm: _BatchNorm | None,
    w_scale: Tensor,
    deq_scale: Tensor,
    channel_axis: int,
) -> Tensor:
    """The accumulators as float64, which holds them exactly, saturated to 32 bits; shape of ``sums``.

    ``sums``: int32, of the layer's product of codes; ``bias`` and ``w_scale``: of the layer; ``norm``: the BatchNorm
    that follows; ``deq_scale``: the layer's `deq_scale()`. A channel whose scale is not positive holds NaN or undefined
    values.
    """
    shape = [1] * sums.dim()
    shape[channel_axis] = -1
    total = sums.double()
    added = None if bias is None else full_tensor(bias).double()
    if norm is not None:
        assert norm.running_mean is not None and norm.running_var is not None
        factor, added = fold_batch_norm(added, *affine(norm), norm.running_mean, norm.running_var, norm.eps)
        total *= factor_sign(w_scale.double(), factor).view(shape)
    if added is not None:
        total += (added / deq_scale.double()).round_().view(shape)
    limits = torch.iinfo(torch.int32)
    return total.clamp_(limits.min, limits.max)
