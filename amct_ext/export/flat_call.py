"""A model that takes plain tensors and returns plain tensors, whatever its forward takes and returns."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from amct_ext.errors import ExportError
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import tensors_in


@contextmanager
def flat_call(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> Iterator[None]:
    """While this lasts, `model` takes the tensors of `inputs`, one by one, and returns a tuple of tensors.

    Everything else in `inputs` (numbers, None, containers) is a constant; numbers and None in the output are left out.
    Hooks and a forward with another signature, not a module around the model: names of parameters and modules stay what
    they are, and so do the model's own hooks. ExportError in the forward where it returns no tensor.
    """
    forward, own = model.forward, "forward" in vars(model)
    given: list[torch.Tensor] = []

    def run(*args: object, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    def unflatten(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given[:] = [*args, *kwargs.values()]
        call = inputs.with_tensors(given)
        return call.args, call.kwargs

    def flatten(_: nn.Module, __: object, output: object) -> tuple[torch.Tensor, ...]:
        tensors = tuple(tensors_in(output))
        if not tensors:
            raise ExportError(f"the model returns no tensor, but {type(output).__name__}")
        return _computed(tensors, [*given, *model.parameters(), *model.buffers()])

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in _identifiers(names)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = run
    handles = [
        model.register_forward_pre_hook(unflatten, with_kwargs=True, prepend=True),
        model.register_forward_hook(flatten),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if own:
            model.forward = forward
        else:
            del model.forward


def _computed(tensors: Sequence[torch.Tensor], known: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors, one of its own for each output: a copy of those that are inputs, parameters or returned before."""
    taken = {id(tensor) for tensor in known}
    outputs = []
    for tensor in tensors:
        outputs.append(tensor.clone() if id(tensor) in taken else tensor)
        taken.add(id(tensor))
    return tuple(outputs)


def _identifiers(names: Sequence[str]) -> list[str]:
    """Distinct Python names for the tensors; the exporters make their own names of them."""
    return [f"{re.sub(r'[^0-9a-zA-Z]', '_', name)}__{index}" for index, name in enumerate(names)]
