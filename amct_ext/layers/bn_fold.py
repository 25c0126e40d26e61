"""BatchNorm with fixed statistics: applied as it is, or folded into the scales and the bias of the layer before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from amct_ext.common.ranks import full_tensor

# A smaller scale of a weight is, times the scale of an activation, no normal float32 number any more.
_MIN_SCALE = 2.0**-103


def apply_batch_norm(y: Tensor, norm: _BatchNorm) -> Tensor:
    """``y`` normalised by the running statistics of ``norm``, whatever its mode."""
    return F.batch_norm(y, norm.running_mean, norm.running_var, *affine(norm), False, 0.0, norm.eps)


def affine(norm: _BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """(gamma, beta) of ``norm``, gathered where they are sharded; None where it has none."""
    return _whole_or_none(norm.weight), _whole_or_none(norm.bias)


def fold_scale(scale: Tensor, norm: _BatchNorm) -> Tensor:
    """Scales of a weight (one, or one per channel) as they are recorded: times the factor of a BatchNorm behind it.

    1 where the product is below 2^-103 (a factor of 0, or denormal): the files hold a weight of zeros there, and any
    positive scale is right. Not finite where the factor is not.
    """
    assert norm.running_var is not None
    factor = norm.running_var.add(norm.eps).rsqrt()
    gamma = _whole_or_none(norm.weight)
    if gamma is not None:
        factor = factor * gamma.detach()
    both = scale.abs() * factor.abs()
    return torch.where(both < _MIN_SCALE, torch.ones_like(both), both)


def factor_sign(scale: Tensor, factor: Tensor) -> Tensor:
    """Sign of a BatchNorm's factor, 0 where `fold_scale` replaces the scale by 1."""
    return factor.sign() * ((scale * factor).abs() >= _MIN_SCALE)


def fold_batch_norm(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(factor, shift), one float64 value per channel each: normalised(y + bias) is y * factor + shift.

    ``bias``: of the layer before the BatchNorm; it, ``gamma`` and ``beta`` may be None.
    """
    factor = (variance.double() + eps).rsqrt_()
    if gamma is not None:
        factor *= gamma
    shift = ((0.0 if bias is None else bias) - mean.double()) * factor
    if beta is not None:
        shift += beta
    return factor, shift


def _whole_or_none(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else full_tensor(parameter)
