"""What follows a convolution and can run in one pass: BatchNorm, an activation function, fake quantisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amct_ext import ops

_aten = torch.ops.aten
_amct = torch.ops.amct_ext
OpOverload = torch._ops.OpOverload[..., Any]


class ActivationFunction(NamedTuple):
    """An activation function: torch's op, and what `ops.batch_norm_ulq` takes for it."""

    op: OpOverload
    name: str
    lowest: float | None
    highest: float | None


def activation_of(op: OpOverload, arguments: tuple[Any, ...]) -> ActivationFunction | None:
    """The activation function that an op and its arguments behind the tensor are; None: bounds that cross."""
    if op is _aten.relu.default:
        return ActivationFunction(_aten.relu.default, "none", 0.0, None)
    if op is _aten.hardswish.default:
        return ActivationFunction(_aten.hardswish.default, "hardswish", None, None)
    low, high = (*arguments, -1.0, 1.0)[:2] if len(arguments) != 1 else (arguments[0], 1.0)
    return ActivationFunction(_aten.hardtanh.default, "none", low, high) if low < high else None


class BatchNorm(NamedTuple):
    """A BatchNorm of one forward: its input, and its statistics and parameters as they were then."""

    x: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    training: bool  # whether mean and invstd are those of x


@dataclass(frozen=True)
class BatchNormChain:
    """A BatchNorm and what was applied to its output so far."""

    norm: BatchNorm
    is_sum: bool = False  # another tensor was added to BatchNorm's output
    addend: Tensor | None = None  # that tensor, until the values have been computed
    activation: ActivationFunction | None = None
    padding: tuple[int, ...] | None = None  # with zeros, as `torch.ops.aten.constant_pad_nd` takes it

    @property
    def takes_activation(self) -> bool:
        return self.activation is None and self.padding is None

    @property
    def is_norm_alone(self) -> bool:
        return self.takes_activation and not self.is_sum

    @property
    def is_sum_with_relu(self) -> bool:
        return self.is_sum and self.activation is not None and self.activation.op is _aten.relu.default

    def plus(self, addend: Tensor) -> BatchNormChain:
        """The sum with another tensor, of the shape and strides of BatchNorm's input."""
        return replace(self, is_sum=True, addend=addend)

    def compute(self) -> Tensor:
        """The values, with the bits of torch's ops."""
        assert self.is_sum == (self.addend is not None)
        y: Tensor = _amct.batch_norm_activation.default(*self._arguments, self.addend)
        return y if self.padding is None else _pad(y, self.padding)

    def quantize(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The values, of no sum, fake-quantised; further arguments and results as of `ops.ulq_fake_quantize`."""
        y, *others = _amct.batch_norm_ulq.default(*self._arguments, *arguments)
        # Zero has a code of its own: padding before and after are the same.
        return y if self.padding is None else _pad(y, self.padding), *others

    def quantized_backward(self, grad: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int) -> tuple[Tensor, ...]:
        """Gradients of `quantize` in input, weight, bias and clips, from that of the quantised values."""
        if self.padding is not None:
            grad = _pad(grad, tuple(-size for size in self.padding))
        results: tuple[Tensor, ...] = _amct.batch_norm_ulq_backward.default(
            grad, *self._arguments, clip_max, clip_min, num_bits, self.norm.training
        )
        return results

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of BatchNorm's input, weight and bias from that of the values: no sum, and not padded."""
        results: tuple[Tensor, Tensor, Tensor] = _amct.batch_norm_activation_backward.default(
            grad, *self._arguments, self.norm.training
        )
        return results

    @property
    def _arguments(self) -> tuple[Any, ...]:
        a = self.activation
        return (*self.norm[:5], *(("none", None, None) if a is None else (a.name, a.lowest, a.highest)))


def _pad(x: Tensor, padding: tuple[int, ...]) -> Tensor:
    y: Tensor = _aten.constant_pad_nd.default(x, padding)
    return y


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> BatchNorm:
    """The BatchNorm of ``x``; in training the running statistics are updated, as torch's op does."""
    kept = None if weight is None else weight.clone(), None if bias is None else bias.clone()
    if not training:
        assert running_mean is not None and running_var is not None
        return BatchNorm(x, running_mean.clone(), (running_var + eps).sqrt().reciprocal(), *kept, training)
    if x.is_contiguous() and x.dim() > 2:
        mean, invstd = ops.batch_norm_statistics_(x, running_mean, running_var, momentum, eps)
    else:  # torch's kernel for this layout adds in an order that depends on the number of threads
        mean, variance = torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
        invstd = (variance.double() + eps).sqrt().reciprocal().float()
    return BatchNorm(x, mean, invstd, *kept, training)
