"""A normalisation by fixed statistics behind a product, as factor and term of each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amct_ext.common.ranks import whole

# Below this a scale of weights, times one of data, is no normal float32 number any more.
_SMALLEST = 2.0**-103


def fold_scale(scale: Tensor, norm: Any) -> Tensor:
    """Scales of a weight (one, or one per channel) as they are recorded: times the factor of a BatchNorm behind it.

    1 where that is next to nothing (a factor of 0, or denormal): the files hold a weight of zeros there, and any
    positive scale is right. Not finite where the factor is not.
    """
    factor: Tensor = norm.running_var.add(norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * whole(norm.weight.detach())
    both = scale.abs() * factor.abs()
    return torch.where(both < _SMALLEST, torch.ones_like(both), both)


def factor_sign(scale: Tensor, factor: Tensor) -> Tensor:
    """Sign of a BatchNorm's factor, 0 where `fold_scale` takes it for next to nothing."""
    return factor.sign() * ((scale * factor).abs() >= _SMALLEST)


def fold_batch_norm(
    bias: Tensor | None, weight: Tensor | None, shift: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(factor, term), one float64 value per channel each: normalised(y + bias) is y * factor + term.

    ``bias``: of the product; ``weight`` and ``shift``: of the normalisation; each may be None.
    """
    factor = (variance.double() + eps).rsqrt_()
    if weight is not None:
        factor *= weight
    term = ((0.0 if bias is None else bias) - mean.double()) * factor
    if shift is not None:
        term += shift
    return factor, term
