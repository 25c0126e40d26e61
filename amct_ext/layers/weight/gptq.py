"""GPTQ: a weight is rounded column by column; the columns not yet rounded make up for the error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.forward_context import state_updates_disabled

_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_BLOCK_COLUMNS = 128  # of a block; those behind it are updated once per block
_MAX_PATCH_VALUES = 2**22  # of an unfolded input at a time
_FLOAT64_DEVICES = ("cpu", "cuda")


class ObservedLayer(Protocol):
    """What GPTQ reads of a layer."""

    @property
    def input_quantizer(self) -> ActivationQuantizer | None:
        """The quantiser whose calibration is waited for."""

    def input_matrices(self, x: Tensor) -> Iterator[Tensor]:
        """The input as matrices (positions, columns of the weight)."""


class GptqState:
    """What GPTQ gathers of one layer during a calibration. It is in no state dict, but copied and pickled.

    hessian: X^T X of the layer's float input, (columns, columns) of the weight, float32 (float64 where the input is);
    None before the first batch and once ``done``. done: the weight was changed, or is to stay. shape: of the whole
    weight.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.hessian: Tensor | None = None
        self.done = False

    @torch.no_grad()
    def add_batch(self, layer: ObservedLayer, x: Tensor) -> None:
        """Add the input of a forward that has just given the calibration a batch; of any other nothing."""
        if self.done or torch.compiler.is_compiling() or state_updates_disabled() or x.numel() == 0:
            return
        quantizer = layer.input_quantizer
        if quantizer is None or not quantizer.took_batch:
            return
        with torch.autocast(x.device.type, enabled=False):
            for rows in layer.input_matrices(x.detach()):
                rows = rows if rows.dtype == torch.float64 else rows.float()
                added = rows.t() @ rows
                self.hessian = added if self.hessian is None else self.hessian.to(added).add_(added)

    def finish(self) -> None:
        """Free the Hessian and take no more batches."""
        self.hessian, self.done = None, True

    def reset(self, done: bool) -> None:
        """Drop what was gathered: after a load it belongs to another state."""
        self.hessian, self.done = None, done


def gptq_weight(weight: Tensor, hessian: Tensor, scale: Tensor, num_bits: int, round_result: bool = False) -> Tensor:
    """The weight with its columns changed by GPTQ, so that rounding it to codes of ``scale`` costs the output least.

    1. Columns are sorted by falling diagonal of the Hessian.
    2. Each is rounded; the least squares solution for the inputs seen spreads its error over the columns behind it.
    3. The result holds each column as it was just before it was rounded: training goes on with what rounding left of
       it. With ``round_result`` it holds the codes times the scale, so a scale searched on the result is this one.

    weight: (rows, ...), floating point. hessian: (columns, columns), X^T X. scale: 1 or one per row. Returns the shape,
    dtype and device of the weight; the weight itself where the Hessian is zero or not finite. Computes in float64.
    Sources: Frantar et al. 2022 (GPTQ); Hassibi and Stork 1993 (optimal brain surgeon).
    """
    device = weight.device if weight.device.type in _FLOAT64_DEVICES else torch.device("cpu")
    columns = weight.flatten(1).to(device, torch.float64, copy=True)
    hessian = hessian.to(device, torch.float64)
    step = scale.to(device, torch.float64).reshape(-1)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_cholesky(hessian[order][:, order])
    if factor is None:
        return weight
    columns = columns[:, order]
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    count = columns.shape[1]
    for begin in range(0, count, _BLOCK_COLUMNS):
        end = min(begin + _BLOCK_COLUMNS, count)
        errors = columns.new_empty(columns.shape[0], end - begin)
        for i in range(begin, end):
            column = columns[:, i]
            rounded = torch.clamp(torch.round(column / step), low, high) * step
            error = errors[:, i - begin] = (column - rounded) / factor[i, i]
            columns[:, i + 1 : end] -= error[:, None] * factor[i, i + 1 : end]
            if round_result:
                columns[:, i] = rounded
        columns[:, end:] -= errors @ factor[begin:end, end:]
    result = torch.empty_like(columns)
    result[:, order] = columns
    return result.view(weight.shape).to(weight)


def _inverse_cholesky(hessian: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse of the damped Hessian; None where there is none."""
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


def im2col(
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
    x = x.movedim(1, 1 + dims)  # sample, positions, channel, kernel
    columns = math.prod(x.shape[1 + dims :])
    row_values = columns * math.prod(x.shape[2 : 1 + dims])
    for part in x.split(max(1, _MAX_PATCH_VALUES // max(1, row_values * x.shape[1])), 0):
        for piece in part.split(max(1, _MAX_PATCH_VALUES // max(1, row_values * part.shape[0])), 1):
            yield piece.reshape(-1, columns)
