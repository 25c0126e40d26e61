"""What callers give as input_data: the arguments of a model's forward, by position and by name."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amct_ext.errors import InputDataError
from amct_ext.graph.run import preserved_state, tensors_in

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        """What the model returns for these arguments."""
        return model(*self.args, **self.kwargs)

    def evaluate(self, model: nn.Module) -> list[torch.Tensor]:
        """Copies of the tensors that the model returns in eval mode; model and arguments stay as they are."""
        with preserved_state(model), torch.no_grad():
            return [tensor.clone() for tensor in tensors_in(self.copied().call(model))]

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in the arguments, in order."""
        return [tensor for _, tensor in _leaves((self.args, self.kwargs), "")]

    def with_tensors(self, tensors: list[torch.Tensor]) -> Inputs:
        """The same arguments with other tensors in the places that `tensors()` lists."""
        args, kwargs = _rebuilt((self.args, self.kwargs), iter(tensors))
        return Inputs(args, kwargs)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same arguments with a function applied to every tensor."""
        return self.with_tensors([function(tensor) for tensor in self.tensors()])

    def copied(self) -> Inputs:
        """The same arguments with copies of the tensors: a forward may write into what it is given.

        Copies have no history and keep `requires_grad`; a tensor that is given twice is one tensor again.
        """
        copies: dict[int, torch.Tensor] = {}
        for tensor in self.tensors():
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return self.map(lambda tensor: copies[id(tensor)])

    def in_order(self, model: nn.Module) -> Inputs:
        """The same call with the keywords in the order of forward's signature, whatever order the caller had."""
        signature = _signature(model)
        if signature is None:
            return self
        known = [name for name in signature.parameters if name in self.kwargs]
        return Inputs(self.args, {name: self.kwargs[name] for name in dict.fromkeys([*known, *self.kwargs])})

    def names(self, model: nn.Module) -> list[str]:
        """A name for each of `tensors()`: forward's argument, with the way to the tensor where it is inside of one."""
        signature = _signature(model)
        found: list[str] = []
        parameters = [] if signature is None else list(signature.parameters.values())
        for index, value in enumerate(self.args):
            name = f"input_{index}"
            if index < len(parameters) and parameters[index].kind in _POSITIONAL:
                name = parameters[index].name
            found += [leaf for leaf, _ in _leaves(value, name)]
        for key, value in self.kwargs.items():
            found += [leaf for leaf, _ in _leaves(value, key)]
        return found

    def __str__(self) -> str:
        parts = [_described(value) for value in self.args]
        parts += [f"{name}={_described(value)}" for name, value in self.kwargs.items()]
        return ", ".join(parts) or "no arguments"


def parse_inputs(model: nn.Module, input_data: Any) -> Inputs:
    """The arguments that `input_data` describes. The model is not changed.

    A tensor is the one argument, a tuple the arguments by position. As for torch.onnx.export, a dict at the end of the
    tuple holds arguments by name; one that is meant by position is followed by an empty dict, which is not needed where
    the names do not fit and forward has to be given something in that place. A mapping by itself holds arguments by
    name, or is the only argument under the same condition. A list is the one argument (a detector's images), or the
    arguments by position where the model does not run on it. InputDataError for anything else without tensors, and for
    names that forward does not have.
    """
    if isinstance(input_data, Inputs):
        return input_data
    if isinstance(input_data, tuple):
        *head, last = input_data if input_data else (None,)
        if input_data and _is_named(last):
            return _named(model, tuple(head), last)
        return Inputs(tuple(input_data))
    if _is_named(input_data):
        return _named(model, (), input_data)
    if isinstance(input_data, list):
        return _listed(model, input_data)
    if isinstance(input_data, nn.Module) or next(tensors_in(input_data), None) is None:
        raise InputDataError(
            f"input_data is of type {type(input_data).__name__}: give a tensor, a tuple of the arguments (a dict at "
            "its end holds arguments by name), or a dict of arguments by name"
        )
    return Inputs((input_data,))


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _named(model: nn.Module, head: tuple[Any, ...], last: Mapping[str, Any]) -> Inputs:
    by_name = Inputs(head, dict(last.items())).in_order(model)
    signature = _signature(model)
    if signature is None or _binds(signature, *by_name.args, **by_name.kwargs):
        return by_name
    positional = [
        p for p in signature.parameters.values() if p.kind in (*_POSITIONAL, inspect.Parameter.VAR_POSITIONAL)
    ]
    next_one = positional[min(len(head), len(positional) - 1)] if positional else None
    unknown = [name for name in last if name not in signature.parameters]
    meant_by_position = (
        len(unknown) == len(last) and next_one is not None and next_one.default is inspect.Parameter.empty
    )
    if meant_by_position and _binds(signature, *head, last):
        return Inputs((*head, last))
    takes = ", ".join(signature.parameters) or "nothing"
    problem = f"names {', '.join(map(repr, unknown))}" if unknown else f"({by_name}) is not a call"
    raise InputDataError(f"input_data {problem}, but {type(model).__name__}.forward takes {takes}")


def _listed(model: nn.Module, values: list[Any]) -> Inputs:
    """One argument, as torch.onnx.export has it, unless the model only runs on the items."""
    signature = _signature(model)
    one, several = Inputs((values,)), Inputs(tuple(values))
    if next(tensors_in(values), None) is None:
        raise InputDataError("input_data is a list without tensors")
    if signature is None or not _binds(signature, *values):
        return one
    if not _binds(signature, values):
        return several
    try:
        with preserved_state(model), torch.no_grad():
            one.copied().call(model)
    except Exception:
        return several
    return one


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward that is not Python's
        return None


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_described(item)}" for key, item in value.items()) + "}"
    return type(value).__name__


def _leaves(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif (split := _split(value)) is not None:
        for key, part in split[0]:
            yield from _leaves(part, f"{name}_{key}")


def _rebuilt(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return next(tensors)
    split = _split(value)
    return value if split is None else split[1]([_rebuilt(part, tensors) for _, part in split[0]])


def _split(value: Any) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any]] | None:
    """The parts of a container with their keys, and how to make it anew from other parts; None for anything else."""
    parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    if not (len(parts) == 1 and parts[0] is value):
        keys = list(value) if isinstance(value, Mapping) and len(value) == len(parts) else list(range(len(parts)))
        return list(zip(keys, parts, strict=True)), lambda new: pytree.tree_unflatten(new, spec)
    if isinstance(value, Mapping):
        return list(value.items()), lambda new: _with_items(value, new)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [part.name for part in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names], lambda new: _with_fields(value, names, new)
    return None


def _with_items(value: Any, new: list[Any]) -> Any:
    """A mapping of the same class, which its tokenizer's or collator's model may ask for."""
    other = copy.copy(value)
    for key, part in zip(value, new, strict=True):
        other[key] = part
    return other


def _with_fields(value: Any, names: list[str], new: list[Any]) -> Any:
    other = copy.copy(value)
    for name, part in zip(names, new, strict=True):
        object.__setattr__(other, name, part)  # frozen ones too
    return other
