"""Which value of a trace each tensor of a running forward holds, in-place writes through aliases included."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import nn

from amct_ext.graph.values import Value, value_of

# Nodes that no op is: values that depend on each other through shared memory.
RELATIONS = ("unseen_view", "overwritten_part", "host_memory")

# Makes the value of a tensor that depends on others through shared memory: op name, those values, the tensor.
Relate = Callable[[str, tuple[Value, ...], torch.Tensor], Value]


class TensorValues:
    """Values by tensor object. Every tensor seen is kept alive: neither ids nor storages are reused.

    `foreign` collects parameters that were looked up and never bound: none of the model's.
    """

    def __init__(self, relate: Relate) -> None:
        self.foreign: list[nn.Parameter] = []
        self._relate = relate
        self._values: dict[int, Value] = {}
        self._aliases: dict[Hashable, list[torch.Tensor]] = {}

    def bind(self, tensor: torch.Tensor, value: Value) -> Value:
        """Let `tensor` hold `value` from now on; returns the value."""
        known = id(tensor) in self._values
        self._values[id(tensor)] = value
        if not known:
            self._aliases.setdefault(_storage(tensor), []).append(tensor)
        return value

    def lookup(self, tensor: torch.Tensor) -> Value:
        """The value that `tensor` holds; a new constant where nothing is known of its memory."""
        value = self._values.get(id(tensor))
        if value is not None:
            return value
        aliases = self._aliases.get(_storage(tensor), [])
        for alias in aliases:
            if _geometry(alias) == _geometry(tensor):
                return self.bind(tensor, self._values[id(alias)])
        sources = [self._values[id(alias)] for alias in aliases]
        if any(source.kind in ("computed", "input") for source in sources):
            # A view made where ops are not recorded: related to its aliases in an unknown way.
            return self.bind(tensor, self._relate("unseen_view", tuple(sources), tensor))
        if isinstance(tensor, nn.Parameter):
            self.foreign.append(tensor)
        return self.bind(tensor, value_of(tensor, "constant"))

    def overwrite(self, tensor: torch.Tensor, value: Value) -> None:
        """New content of `tensor`: the same for every alias of the same elements, partly new for those that overlap."""
        for alias in list(self._aliases.get(_storage(tensor), [])):
            if alias is tensor or _geometry(alias) == _geometry(tensor):
                self._values[id(alias)] = value
            else:
                self._values[id(alias)] = self._relate("overwritten_part", (self._values[id(alias)], value), alias)
        self.bind(tensor, value)


def _storage(tensor: torch.Tensor) -> Hashable:
    """Identity of the memory behind a tensor; tensors without any (sparse layouts) stand for themselves."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return ("object", id(tensor))


def _geometry(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype
