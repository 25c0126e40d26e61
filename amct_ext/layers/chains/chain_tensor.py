"""Lazy values behind a convolution, so that BatchNorm, activation function and fake quantisation run in one pass.

In a training step each of them reads and writes a whole activation, forward and backward. A `ChainTensor` stands for
the output of BatchNorm or of the activation function; the quantiser that reads it computes everything in one pass over
the convolution's output, and so does backward. This happens below autograd: the graph has torch's nodes, so hooks,
checkpoints and control flow work as ever. Any other op gets plain values that torch's ops compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amct_ext.layers.chains.backward_rules import BACKWARD_RULES
from amct_ext.layers.chains.batch_norm_chain import OpOverload
from amct_ext.layers.chains.chain_values import ChainTensorBase, ChainValues, materialize
from amct_ext.layers.chains.forward_rules import FORWARD_RULES
from amct_ext.layers.forward_context import traced_or_transformed

_aten = torch.ops.aten
_RULES = FORWARD_RULES | BACKWARD_RULES
# A layer's chain takes about half a millisecond of Python a step. Below so many values the passes that it saves take
# less. The same for any number of threads, so that gradients have the same bits.
_MIN_VALUES = 2**18


class ChainTensor(ChainTensorBase):
    """A tensor whose values are pending or known (module docstring)."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(func)
        result = NotImplemented if rule is None else rule(func, *args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        for leaf in tree_leaves(_aliased(func, args, kwargs or {})):
            if isinstance(leaf, ChainTensorBase):
                leaf.chain_values.materialize_for_write()
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **(kwargs or {}))  # changes the sizes and strides that the wrapper reports
            args[0].replace(_aten.alias.default(args[0].chain_values.get()))  # aliases keep theirs
        return func(*materialize(args), **materialize(kwargs or {}))


def _aliased(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the op writes to or returns a view of."""
    aliased: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None:
            aliased.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return aliased


class ChainConvolutions(TorchDispatchMode):
    """While active, the outputs of convolutions become chain tensors, if they are large."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not _aten.convolution.default or type(result) is not Tensor or result.dtype != torch.float32:
            return result
        return ChainTensor(ChainValues(value=result), result) if result.numel() >= _MIN_VALUES else result


def chain_convolutions(x: Tensor, enabled: bool) -> AbstractContextManager[Any]:
    """`ChainConvolutions` for a convolution on ``x``, where that is enabled and possible."""
    return ChainConvolutions() if enabled and _can_chain(x) else nullcontext()


def as_chain(y: Tensor, enabled: bool) -> Tensor:
    """A chain tensor of the values of ``y``, which nothing else holds, where possible and worth it; else ``y``."""
    starts = enabled and y.numel() >= _MIN_VALUES and _can_chain(y)
    return ChainTensor(ChainValues(value=y), y) if starts else y


def _can_chain(x: Tensor) -> bool:
    """Whether this is a plain eager forward on the CPU."""
    return not traced_or_transformed() and x.device.type == "cpu" and torch._C._len_torch_dispatch_stack() == 0
