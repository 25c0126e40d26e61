"""Compressed convolutions, transposed convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.config.plan import LayerPlan
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.weight.gptq import GptqState, im2col


class GptqLayer(CompressedLayer):
    """A layer whose output is one matrix product of input and weight: its weight can compensate for its rounding."""

    gptq: GptqState | None = None  # None: the calibration leaves the weight as it is

    def _forward(self, x: Tensor, *args: Any) -> Tensor:
        y = super()._forward(x, *args)
        if self.gptq is not None:
            self.gptq.add_batch(self, x)
        return y

    def input_matrices(self, x: Tensor) -> Iterator[Tensor]:
        """The input as matrices (positions, columns of the weight), in parts."""
        raise NotImplementedError

    def _add_children(self, plan: LayerPlan, batch_num: int, fixed_min: bool) -> None:
        super()._add_children(plan, batch_num, fixed_min)
        if plan.quant is None or not plan.quant.weight.compensate:
            return
        # Configured clips are not calibrated; a 2:4 mask decides on the weight.
        if self.sparsity is None and plan.quant.data.clip_max is None and getattr(self, "groups", 1) == 1:
            self.gptq = GptqState(self.weight.shape)


class _CompressedConv(GptqLayer):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of the float class
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def input_matrices(self, x: Tensor) -> Iterator[Tensor]:
        return im2col(x, self, self.kernel_size, self.stride, self.dilation)

    def compute_with_weight(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class CompressedConv1d(_CompressedConv, nn.Conv1d):
    pass


class CompressedConv2d(_CompressedConv, nn.Conv2d):
    pass


class CompressedConv3d(_CompressedConv, nn.Conv3d):
    pass


class CompressedLinear(GptqLayer, nn.Linear):  # type: ignore[misc]  # torch types its bias as never None
    channel_axis_out = -1

    def input_matrices(self, x: Tensor) -> Iterator[Tensor]:
        yield x.reshape(-1, x.shape[-1])

    def compute_with_weight(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        return F.linear(x, weight, self.bias)


class _CompressedConvTranspose(CompressedLayer):
    in_axis = 0
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    _output_padding: Callable[..., list[int]]  # of the float class

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the float class."""
        return self._forward(input, output_size)

    def _to_rows(self, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return weight.transpose(0, 1)
        return torch.unflatten(weight, 0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _from_rows(self, rows: Tensor) -> Tensor:
        return self._to_rows(rows)  # swaps the two channel axes of each group, so it is its own inverse

    def compute_with_weight(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        dims = len(self.kernel_size)
        output_size = args[0] if args else None
        extra = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
        conv: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return conv(x, weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)


class CompressedConvTranspose1d(_CompressedConvTranspose, nn.ConvTranspose1d):
    pass


class CompressedConvTranspose2d(_CompressedConvTranspose, nn.ConvTranspose2d):
    pass


class CompressedConvTranspose3d(_CompressedConvTranspose, nn.ConvTranspose3d):
    pass
