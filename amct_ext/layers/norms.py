"""A normalisation by fixed statistics behind a product, as factor and term of each channel."""

from __future__ import annotations

from torch import Tensor


def folded(
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
