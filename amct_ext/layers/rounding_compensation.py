"""GPTQ: weights changed so that later input channels make up for what rounding earlier ones costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.layers.activation_quantizer import ActivationQuantizer
from amct_ext.layers.forward_context import state_updates_disabled

_DAMPING = 0.01  # of the mean of the diagonal
_COLUMNS = 128  # rounded before the columns behind them are updated
_PATCH_VALUES = 2**22  # of an unfolded input at a time
_FLOAT64_DEVICES = ("cpu", "cuda")


class ObservedLayer(Protocol):
    """What is read of a layer while it calibrates."""

    @property
    def activation(self) -> ActivationQuantizer | None:
        """The quantiser whose calibration is waited for."""

    def weight_inputs(self, x: Tensor) -> Iterator[Tensor]:
        """The input as matrices (positions, columns of the weight)."""


class RoundingCompensation:
    """The second moments X^T X of a layer's float input over a calibration: in no state dict, but copied and pickled.

    ``settled``: the weight was changed, or is to stay. State: one matrix (columns of the weight, squared) in float32
    (float64 where the input is), until then. ``shape``: of the whole weight.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.moment: Tensor | None = None
        self.settled = False

    @torch.no_grad()
    def observe(self, layer: ObservedLayer, x: Tensor) -> None:
        """Add the input of a forward that has just given the calibration a batch; of any other nothing."""
        if self.settled or torch.compiler.is_compiling() or state_updates_disabled() or x.numel() == 0:
            return
        quantizer = layer.activation
        if quantizer is None or not quantizer.took_batch:
            return
        with torch.autocast(x.device.type, enabled=False):
            for rows in layer.weight_inputs(x.detach()):
                rows = rows if rows.dtype == torch.float64 else rows.float()
                added = rows.t() @ rows
                self.moment = added if self.moment is None else self.moment.to(added).add_(added)

    def settle(self) -> None:
        """Free the moments; nothing is waited for any more."""
        self.moment, self.settled = None, True

    def restart(self, settled: bool) -> None:
        """After a load: what was gathered belongs to another state."""
        self.moment, self.settled = None, settled


def compensated_weight(weight: Tensor, moment: Tensor, scale: Tensor, num_bits: int, on_codes: bool = False) -> Tensor:
    """The weight whose rounding to codes of ``scale`` changes the layer's output least, column after column.

    Columns are taken in the order of falling second moments. What rounding one costs, the columns behind it make up by
    the least squares solution for the inputs seen. The result holds each column as it was when it was rounded, so its
    codes are the compensated ones and what is left of it goes on in training; with ``on_codes`` the codes times the
    scale, so that a scale that is searched on the result is this one again.

    weight: (rows, ...), floating point. moment: (columns, columns), X^T X. scale: 1 or one per row. Returns the shape,
    dtype and device of the weight; the weight itself where the moments are zero or not finite. Computes in float64.
    Sources: Frantar et al. 2022 (GPTQ); Hassibi and Stork 1993 (optimal brain surgeon).
    """
    device = weight.device if weight.device.type in _FLOAT64_DEVICES else torch.device("cpu")
    columns = weight.flatten(1).to(device, torch.float64, copy=True)
    hessian = moment.to(device, torch.float64)
    step = scale.to(device, torch.float64).reshape(-1)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    if factor is None:
        return weight
    columns = columns[:, order]
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    count = columns.shape[1]
    for begin in range(0, count, _COLUMNS):
        end = min(begin + _COLUMNS, count)
        errors = columns.new_empty(columns.shape[0], end - begin)
        for i in range(begin, end):
            column = columns[:, i]
            rounded = torch.clamp(torch.round(column / step), low, high) * step
            error = errors[:, i - begin] = (column - rounded) / factor[i, i]
            columns[:, i + 1 : end] -= error[:, None] * factor[i, i + 1 : end]
            if on_codes:
                columns[:, i] = rounded
        columns[:, end:] -= errors @ factor[begin:end, end:]
    result = torch.empty_like(columns)
    result[:, order] = columns
    return result.view(weight.shape).to(weight)


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse of the damped matrix; None where there is none."""
    mean = hessian.diagonal().mean()
    if not (math.isfinite(float(mean)) and float(mean) > 0):
        return None
    damping = _DAMPING * mean
    for _ in range(3):  # more damping where rounding has left the matrix indefinite
        damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return upper
        damping = 10 * damping
    return None


def convolution_inputs(
    x: Tensor, layer: nn.Module, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[Tensor]:
    """The patches of a convolution's input, (positions, channels * kernel) in the order of its weight, in parts.

    layer: the convolution, which knows its padding.
    """
    mode = getattr(layer, "padding_mode", "zeros")
    dims = len(kernel)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    padding: list[int] = list(layer._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    if any(padding):
        x = F.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
    x = x.movedim(1, 1 + dims)  # sample, places, channel, kernel
    columns = math.prod(x.shape[1 + dims :])
    row_values = columns * math.prod(x.shape[2 : 1 + dims])
    for part in x.split(max(1, _PATCH_VALUES // max(1, row_values * x.shape[1])), 0):
        for piece in part.split(max(1, _PATCH_VALUES // max(1, row_values * part.shape[0])), 1):
            yield piece.reshape(-1, columns)
