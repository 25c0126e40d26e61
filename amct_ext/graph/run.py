"""Running a model without leaving a trace in it, and finding the tensors in what it takes and returns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # parameters, children, hooks


@contextlib.contextmanager
def preserved_state(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Eval (or train) mode for a while; modes, buffers, attributes and the random state come back exactly.

    A forward may keep things (a grid for the last size of image, a table that it needs once): the next one finds what
    this one found, and runs the same operators.
    """
    # A scripted module writes to its buffers, but never replaces a buffer object.
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module not in scripted]
    held_tensors = [held for _, owned in buffers for held in owned.values() if held is not None]
    held_tensors += [held for module in scripted for held in module.buffers(recurse=False)]
    copies = [(held, held.clone()) for held in held_tensors]
    with preserved_random_state(model), in_mode(model, training), _preserved_attributes(model):
        try:
            yield
        finally:
            for module, owned in buffers:
                module._buffers.clear()
                module._buffers.update(owned)
            with torch.no_grad():
                for held, copy in copies:
                    if not torch.equal(held, copy):  # some kernels write without bumping the version
                        held.copy_(copy)


@contextlib.contextmanager
def _preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Attributes of modules and the content of their lists and dictionaries come back; tensors are not copied.

    A module that gets other parameters or children meanwhile keeps what it has become: it has built itself.
    """
    kept = [_Attributes(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    try:
        yield
    finally:
        for attributes in kept:
            attributes.restore()


class _Attributes:
    """Attributes of one module as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._held = vars(module)
        self._before = dict(self._held)
        own = [value for name, value in self._before.items() if name not in _MODULE_ATTRIBUTES]
        self._contents = [(value, value.copy()) for value in own if type(value) in (dict, list, OrderedDict)]
        self._parts = [(self._held[name], dict(self._held[name])) for name in ("_parameters", "_modules")]

    def restore(self) -> None:
        if not all(_equal(now, before) for now, before in self._parts):
            return
        if not _equal(self._held, self._before):
            self._held.clear()
            self._held.update(self._before)
        for container, content in self._contents:
            if not _equal(container, content):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)


def _equal(one: Any, two: Any) -> bool:
    """Whether two lists or dictionaries hold the same objects."""
    if isinstance(one, list):
        return len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))
    return one.keys() == two.keys() and all(value is two[key] for key, value in one.items())


@contextlib.contextmanager
def preserved_model_state(model: nn.Module) -> Iterator[None]:
    """Buffers, attributes of modules and the random state come back exactly; modules keep the mode they have.

    Buffers are replaced by copies for a while, so that a backward that has saved them finds them as they were.
    """
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    modules = [module for module in model.modules() if module not in scripted]
    attributes = [(module, dict(vars(module))) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    copies: dict[torch.Tensor, torch.Tensor] = {}
    kept = [(held, held.clone()) for module in scripted for held in module.buffers(recurse=False)]
    for module, owned in buffers:
        for name, held in owned.items():
            if held is not None:
                module._buffers[name] = copies[held] = copies[held] if held in copies else held.clone()
    with preserved_random_state(model):
        try:
            yield
        finally:
            for module, before in attributes:
                vars(module).clear()
                vars(module).update(before)
            for module, owned in buffers:
                module._buffers.clear()
                module._buffers.update(owned)
            for held, copy in kept:
                if not torch.equal(held, copy):
                    held.copy_(copy)


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Eval or train mode for a while; each module's own comes back.

    Flags are set directly: train() and eval() of a user's class may do more than set them.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def preserved_random_state(model: nn.Module) -> Iterator[None]:
    """The generators of torch, of the CPU and of the devices the model lives on, are as before afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU generator
        for kind, indices in _accelerators(model).items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        yield


def _accelerators(model: nn.Module) -> dict[str, set[int]]:
    """Device types other than the CPU that hold parameters and have a generator to keep, with their indices."""
    found: dict[str, set[int]] = {}
    for parameter in model.parameters():
        backend = getattr(torch, parameter.device.type, None)
        if parameter.device.type != "cpu" and hasattr(backend, "get_rng_state") and hasattr(backend, "device_count"):
            found.setdefault(parameter.device.type, set()).add(parameter.device.index or 0)
    return found


def tensors_in(obj: Any) -> Iterator[torch.Tensor]:
    """All tensors in whatever a model takes or returns: containers, dataclasses, objects with tensors in attributes."""
    yield from _tensors(obj, set())


def _tensors(obj: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(obj, torch.Tensor):
        yield obj
        return
    if obj is None or isinstance(obj, (bool, int, float, complex, str, bytes, type, nn.Module)) or id(obj) in seen:
        return
    seen.add(id(obj))
    parts: Any
    if isinstance(obj, Mapping):
        parts = obj.values()
    elif isinstance(obj, (list, tuple, set, frozenset)):
        parts = obj
    elif dataclasses.is_dataclass(obj):
        parts = [getattr(obj, part.name) for part in dataclasses.fields(obj)]
    else:
        parts = vars(obj).values() if hasattr(obj, "__dict__") and not callable(obj) else ()
    for part in parts:
        yield from _tensors(part, seen)
