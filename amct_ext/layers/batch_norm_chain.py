"""What follows a convolution and can run in one pass: BatchNorm, an activation function, fake quantisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amct_ext import ops

_aten = torch.ops.aten
OpOverload = torch._ops.OpOverload[..., Any]
_MOST_MISSES = 4


@dataclass
class ChainSite:
    """Whether the ops behind one layer's convolution are fused: until forward after forward their values were read.

    A copy or pickle of the layer begins anew.
    """

    misses: int = 0

    @property
    def fused(self) -> bool:
        return self.misses < _MOST_MISSES

    def note_use(self) -> None:
        """A quantiser took the values."""
        self.misses = max(self.misses - 1, 0)

    def note_miss(self, used: bool) -> None:
        """Something else read the values; ``used``: beside a quantiser."""
        self.misses += 2 if used else 1

    def __reduce__(self) -> tuple[type[ChainSite], tuple[()]]:
        return ChainSite, ()


class Activation(NamedTuple):
    """An activation function: the op, and what `ops.batch_norm_ulq` takes for it."""

    op: OpOverload
    arguments: tuple[float, ...]
    name: str
    lowest: float | None
    highest: float | None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.op(x, *self.arguments)
        return y


def activation_of(op: OpOverload, arguments: tuple[Any, ...]) -> Activation | None:
    """The activation function that an op and its arguments behind the tensor are; None: not one that is fused."""
    if op in (_aten.relu.default, _aten.relu_.default):
        return Activation(_aten.relu.default, (), "none", 0.0, None)
    if op in (_aten.hardswish.default, _aten.hardswish_.default):
        return Activation(_aten.hardswish.default, (), "hardswish", None, None)
    low, high = (*arguments, *(-1.0, 1.0)[len(arguments) :])
    return Activation(_aten.hardtanh.default, (low, high), "none", low, high) if low < high else None


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNorm of one forward: its input, and its statistics and parameters as they were then."""

    x: Tensor
    mean: Tensor
    invstd: Tensor
    variance: Tensor | None  # of an evaluation; None: mean and invstd are those of x
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def training(self) -> bool:
        return self.variance is None

    def compute(self) -> Tensor:
        """The output, with the bits of torch's op."""
        mean = self.mean if self.variance is not None else None
        arguments = (self.weight, self.bias, mean, self.variance, self.training, 0.0, self.eps)
        y: Tensor = _aten.native_batch_norm.default(self.x, *arguments)[0]
        return y


@dataclass(frozen=True)
class BatchNormChain:
    """A BatchNorm and what was applied to its output so far."""

    norm: BatchNorm
    activation: Activation | None = None
    padding: tuple[int, ...] | None = None  # with zeros, as `torch.ops.aten.constant_pad_nd` takes it

    def then(self, activation: Activation) -> BatchNormChain:
        return replace(self, activation=activation)

    def padded(self, padding: tuple[int, ...]) -> BatchNormChain:
        return replace(self, padding=padding)

    def compute(self) -> Tensor:
        """The values, with the bits of torch's ops."""
        y = self.norm.compute()
        if self.activation is not None:
            y = self.activation(y)
        return y if self.padding is None else _pad(y, self.padding)

    def quantize(self, clips: tuple[Tensor, ...], num_bits: int, fixed_min: bool) -> tuple[Tensor, ...]:
        """The values fake-quantised; the results of `ops.ulq_fake_quantize`."""
        y, *others = ops.batch_norm_ulq(*self._arguments, *clips, num_bits, fixed_min)  # type: ignore[call-arg, arg-type]
        # Zero has a code of its own: padding before and after are the same.
        return y if self.padding is None else _pad(y, self.padding), *others

    def backward(self, grad: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int) -> tuple[Tensor, ...]:
        """Gradients of `quantize` in input, weight, bias and clips, from that of the quantised values."""
        if self.padding is not None:
            grad = _pad(grad, tuple(-size for size in self.padding))
        return ops.batch_norm_ulq_backward(
            grad,
            *self._arguments,  # type: ignore[arg-type]
            clip_max,
            clip_min,
            num_bits,
            self.norm.training,
        )

    @property
    def _arguments(self) -> tuple[Any, ...]:
        n, a = self.norm, self.activation
        bounds = ("none", None, None) if a is None else (a.name, a.lowest, a.highest)
        return (n.x, n.mean, n.invstd, n.weight, n.bias, *bounds)


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
        invstd = (running_var + eps).sqrt().reciprocal()
        return BatchNorm(x, running_mean.clone(), invstd, running_var.clone(), *kept, eps)
    if x.is_contiguous() and x.dim() > 2:
        mean, invstd = ops.batch_norm_statistics_(x, running_mean, running_var, momentum, eps)
    else:  # torch's kernel for this layout adds in an order that depends on the number of threads
        mean, variance = torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
        invstd = (variance.double() + eps).sqrt().reciprocal().float()
    return BatchNorm(x, mean, invstd, None, *kept, eps)
