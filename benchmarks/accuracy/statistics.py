"""Means and standard errors over seeds, and scores of yes and no."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """``error`` is the standard error of the mean; NaN for a single value."""

    mean: float
    error: float
    count: int

    def text(self, decimals: int) -> str:
        """``99.03 ± 0.01``, or without an error and with the count for a single value."""
        mean = f"{self.mean:.{decimals}f}"
        return f"{mean} (1 seed)" if self.count == 1 else f"{mean} ± {self.error:.{decimals}f}"


def summarize(values: Sequence[float]) -> Summary:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("no values to summarise")
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Summary(mean, math.nan, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Summary(mean, math.sqrt(variance / count), count)


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of (count,) scores for boolean labels: the share of pairs that are in order."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    yes, no = int(labels.sum()), int((~labels).sum())
    return (float(ranks[labels].sum()) - yes * (yes + 1) / 2) / (yes * no)
