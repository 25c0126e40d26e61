"""What stands behind a chain tensor: values, or how to compute them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.layers.chains.batch_norm_chain import BatchNormChain
from amct_ext.layers.lazy_tensor import LazyTensor, map_lazy

_T = TypeVar("_T")


@dataclass(frozen=True)
class ChainGradient:
    """A gradient within a chain, and that of the chain's input, which was computed together with it."""

    chain: BatchNormChain  # the gradient is that of its values
    results: tuple[Tensor, Tensor, Tensor]  # gradients of BatchNorm's input, weight and bias


@dataclass(frozen=True)
class ResidualGradient:
    """The gradient of a ReLU's result that is quantised and also read by others; the sum waits for the ReLU's node."""

    result: ChainValues  # of the ReLU
    upstream: Callable[[], Tensor]  # gradient of the quantised values
    quantizer: tuple[Tensor, Tensor, int]  # clips and bits
    addend: Callable[[], Tensor] | None = None  # gradient from the others

    def compute(self) -> Tensor:
        """The gradient itself."""
        dy, _, _ = ops.ulq_fake_quantize_backward(self.upstream(), self.result.get(), *self.quantizer)
        return dy if self.addend is None else self.addend() + dy

    def through_relu(self) -> Tensor:
        """The gradient of the ReLU's input, in one pass."""
        addend = None if self.addend is None else self.addend()
        return ops.ulq_relu_backward(self.upstream(), self.result.get(), addend, *self.quantizer)


class ChainValues:
    """The values of a tensor and of its aliases.

    ``chain`` computes the values of a forward, ``compute`` those of a gradient; either stays where the values have been
    computed, unless they were changed. ``reads``: other values that they read, the convolution's output first.
    """

    def __init__(
        self,
        *,
        value: Tensor | None = None,
        chain: BatchNormChain | None = None,
        gradient: ChainGradient | None = None,
        residual: ResidualGradient | None = None,
        compute: Callable[[], Tensor] | None = None,
        reads: tuple[ChainValues, ...] = (),
    ) -> None:
        self.value = value
        self.chain = chain
        self.gradient, self.residual, self._compute = gradient, residual, compute
        self.reads: tuple[ChainValues, ...] = ()
        self.may_be_written = False  # an alias of the value may be out
        self._readers: weakref.WeakSet[ChainValues] = weakref.WeakSet()
        self.depend_on(*reads)

    @property
    def stored(self) -> Tensor:
        """The tensor that is in memory: the values, or what they are computed from."""
        if self.value is None and self.chain is not None:
            return self.chain.norm.x
        return self.get()

    @property
    def pending(self) -> bool:
        return self.value is None

    @property
    def is_result(self) -> bool:
        """Whether these are values of a forward, no gradient."""
        return self.gradient is None and self.residual is None

    def get(self) -> Tensor:
        """The values; computed where nothing has read them yet."""
        if self.value is None:
            compute = self._compute if self.chain is None else self.chain.compute
            assert compute is not None
            self.value = compute()
            self._forget_addend()
        return self.value

    def depend_on(self, *others: ChainValues) -> None:
        """Note that ``others`` must not change before these values are computed."""
        self.reads += others
        for other in others:
            other._readers.add(self)

    def set(self, value: Tensor) -> None:
        """Other values in their place."""
        self.value, self.chain, self.gradient, self.residual = value, None, None, None

    def compute_readers(self) -> None:
        """Compute all that is computed from these values."""
        for reader in list(self._readers):
            reader.set(reader.get())

    def materialize_for_write(self) -> None:
        """Before the value is changed, or an alias of it given out: compute what is computed from it."""
        self.may_be_written = True
        self.compute_readers()
        self.set(self.get())

    def _forget_addend(self) -> None:
        """The addend has served; nothing else may need its memory."""
        if self.chain is not None and self.chain.addend is not None:
            self.chain, self.reads = replace(self.chain, addend=None), self.reads[:1]


class ChainTensorBase(LazyTensor):
    """A tensor of these values, with the metadata of ``like``; without the rules, which make such tensors, too."""

    chain_values: ChainValues

    @staticmethod
    def __new__(cls, values: ChainValues, like: Tensor) -> Self:
        new = cls.without_memory(like.shape, like.stride(), like.dtype)
        new.chain_values = values
        return new

    def materialize(self) -> Tensor:
        return self.chain_values.get()

    def writable_values(self) -> Tensor:
        self.chain_values.materialize_for_write()
        return self.chain_values.get()

    def replace(self, value: Tensor) -> None:
        self.chain_values = ChainValues(value=value)

    def with_values(self, values: ChainValues, like: Tensor | None = None) -> Self:
        """A tensor of other values, with the shape and layout of ``like``, or of this one."""
        return type(self)(values, self if like is None else like)


def materialize(value: _T) -> _T:
    """``value`` with plain tensors, which have no history, in place of chain tensors."""
    return map_lazy(value, ChainTensorBase, ChainTensorBase.materialize)


def with_history(value: _T) -> _T:
    """``value`` with plain tensors that have the place in the graph that the chain tensors have."""
    return map_lazy(value, ChainTensorBase, torch.ops.aten.alias.default)


def read_later(x: Tensor) -> Callable[[], Tensor]:
    """A function that gives ``x`` later. It raises RuntimeError where ``x`` was modified in place since."""
    version = x._version

    def read() -> Tensor:
        if x._version != version:
            raise RuntimeError(
                f"a gradient of shape {tuple(x.shape)} was modified in place after a backward had read it, and one "
                "that depends on it was read only now; read that one first, or modify a copy"
            )
        return x

    return read


def pending_chain(x: object) -> BatchNormChain | None:
    """The chain of a tensor whose values nothing has computed yet; None: it is another tensor."""
    return x.chain_values.chain if isinstance(x, ChainTensorBase) and x.chain_values.pending else None


def pending_residual(x: object) -> ResidualGradient | None:
    """The gradient that waits for its ReLU behind a tensor; None: it is another tensor, or has been computed."""
    return x.chain_values.residual if isinstance(x, ChainTensorBase) and x.chain_values.pending else None
