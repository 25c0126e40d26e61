"""Copying a model with all that refers to its layers, and putting other modules where it refers to old ones.

A layer may be held by more than its place in the module tree: a second name, a list, tuple or dict of layers, a helper
object, a partial, a bound method, a lambda. Both functions follow the attributes of all modules through these. What a
function holds is followed through plain containers only: behind it may lie the whole program.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from amct_ext.common.held_objects import (
    COMPUTED,
    CONTAINERS,
    LEAVES,
    PLAIN,
    attributes_of,
    contents_of,
    filled_cells,
    leads_nowhere,
    slots_of,
)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy in which functions that hold a part of ``model`` hold the copy's part.

    `copy.deepcopy` takes functions as they are: a lambda over a layer would run the layer of the original. Tensors that
    were computed (a cached activation, a normalised weight) are copied without their history. The original is not
    changed. Errors: those of the model's own parts, where they cannot be copied.
    """
    held = _reachable(model)
    memo: dict[int, Any] = {}
    for part in held.values():
        if isinstance(part, nn.Module):  # a proxy copied as it is would become a second copy of its module
            memo.update((id(proxy), proxy) for proxy in _proxies(part))
        if isinstance(part, torch.Tensor) and not part.is_leaf:
            memo[id(part)] = part.detach().clone()
        elif isinstance(part, torch.jit.ScriptFunction):
            memo[id(part)] = part
        elif isinstance(part, torch.jit.ScriptModule):
            memo[id(part)] = _copy_of_scripted(part)
    duplicate = copy.deepcopy(model, memo)
    modules = [part for part in held.values() if isinstance(part, nn.Module) and id(part) in memo]
    _Rewriter(_successors((part, memo[id(part)]) for part in modules), frozenset(held)).run(duplicate)
    return duplicate


def _copy_of_scripted(module: torch.jit.ScriptModule) -> Any:
    """A copy whose parameters can be trained: torch's own copy makes them results of a computation."""
    with torch.no_grad():
        duplicate = copy.deepcopy(module)
    for old, new in zip(module.parameters(), duplicate.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return duplicate


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put ``new[old]`` wherever ``model`` refers to ``old``, in place; returns the model (or its successor).

    A bound method of an old module becomes the new module's method of that name.
    """
    if not new:
        return model
    result: nn.Module = _Rewriter(_successors(new.items())).run(model)
    return result


def _successors(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> dict[int, Any]:
    """By identity, what stands for each old module, and for the weak proxies to it."""
    found: dict[int, Any] = {}
    for old, new in pairs:
        found[id(old)] = new
        found.update((id(proxy), weakref.proxy(new)) for proxy in _proxies(old))
    return found


def _proxies(module: nn.Module) -> list[Any]:
    return [reference for reference in weakref.getweakrefs(module) if type(reference) in weakref.ProxyTypes]


def _reachable(model: nn.Module) -> dict[int, Any]:
    """By identity, all that a model's attributes lead to, tensors and scripted parts included, constants not."""
    found: dict[int, Any] = {}
    followed: set[int] = set()
    pending: list[tuple[Any, bool]] = [(model, False)]
    while pending:
        obj, in_function = pending.pop()
        if isinstance(obj, LEAVES):
            if isinstance(obj, COMPUTED):
                found[id(obj)] = obj
            continue
        wholly = isinstance(obj, PLAIN) or not in_function
        if id(obj) in (followed if wholly else found):
            continue
        found[id(obj)] = obj
        if wholly:
            followed.add(id(obj))
            inside = in_function or isinstance(obj, (types.FunctionType, weakref.ref))
            pending.extend((part, inside) for part in contents_of(obj))
            if not isinstance(obj, types.FunctionType) and not in_function:
                pending.extend((part, False) for part in attributes_of(obj).values() if not leads_nowhere(part))
                pending.extend((part, False) for _, part in slots_of(obj))
    return found


class _Rewriter:
    """Walks what a model's attributes lead to and replaces objects.

    ``new``: identity of an old object -> its successor. Objects in ``shared`` are somebody else's too: plain containers
    and functions among them are made anew instead of changed, other objects are left alone.
    """

    def __init__(self, new: Mapping[int, Any], shared: frozenset[int] = frozenset()) -> None:
        self._new = new
        self._shared = shared
        self._done: dict[int, tuple[Any, Any]] = {}  # identity -> the object, kept alive, and what it became
        self._cells: dict[int, types.CellType] = {}

    def run(self, obj: Any) -> Any:
        """What stands in the place of ``obj`` from now on."""
        obj = self._new.get(id(obj), obj)
        if isinstance(obj, LEAVES):
            return obj
        if id(obj) not in self._done:
            self._done[id(obj)] = (obj, obj)
            self._done[id(obj)] = (obj, self._rewritten(obj))
        return self._done[id(obj)][1]

    def _rewritten(self, obj: Any) -> Any:
        shared = id(obj) in self._shared
        if shared and not (isinstance(obj, PLAIN) and self._refers_to_old(obj)):
            return obj
        if isinstance(obj, types.FunctionType):
            return self._function(obj, shared) if self._refers_to_old(obj) else obj
        if isinstance(obj, types.MethodType):
            return self._method(obj)
        if isinstance(obj, weakref.ref):
            target = obj()
            return weakref.ref(self.run(target)) if type(obj) is weakref.ref and id(target) in self._new else obj
        if isinstance(obj, functools.partial):
            return self._partial(obj, shared)
        if isinstance(obj, (tuple, frozenset)):
            items = [self.run(item) for item in obj]
            if _same(items, obj):
                return obj
            return obj._make(items) if hasattr(obj, "_make") else type(obj)(items)
        if isinstance(obj, CONTAINERS):
            obj = self._container(obj, shared)
        if not shared:
            self._rewrite_attributes(obj)
        return obj

    def _refers_to_old(self, obj: Any) -> bool:
        """Whether a plain container or function holds an old object, be it inside another one."""
        seen: dict[int, Any] = {}
        pending = [obj]
        while pending:
            part = pending.pop()
            if id(part) in self._new:
                return True
            if isinstance(part, PLAIN) and id(part) not in seen:
                seen[id(part)] = part
                pending.extend(contents_of(part))
        return False

    def _container(self, obj: Any, shared: bool) -> Any:
        """A list, dictionary, ... after its items have been replaced; another one only where it is shared."""
        if not obj:
            return obj
        old = [*obj.items()] if isinstance(obj, dict) else [*obj]
        new = [(self.run(item[0]), self.run(item[1])) if isinstance(obj, dict) else self.run(item) for item in old]
        flat = [part for item in old for part in item] if isinstance(obj, dict) else old
        if _same(flat, [part for item in new for part in item] if isinstance(obj, dict) else new):
            return obj
        target = copy.copy(obj) if shared else obj
        if isinstance(obj, dict):
            if not _same([key for key, _ in old], [key for key, _ in new]):
                dict.clear(target)
            for key, value in new:
                dict.__setitem__(target, key, value)
        elif isinstance(obj, set):
            target.clear()
            target.update(new)
        else:
            for index, item in enumerate(new):
                target[index] = item
        return target

    def _rewrite_attributes(self, obj: Any) -> None:
        attributes = attributes_of(obj)
        for name, value in list(attributes.items()):
            if leads_nowhere(value):
                continue
            new = self.run(value)
            if new is not value:
                attributes[name] = new
        for descriptor, value in list(slots_of(obj)):
            new = self.run(value)
            if new is not value:
                descriptor.__set__(obj, new)

    def _method(self, method: types.MethodType) -> Any:
        old, function = method.__self__, method.__func__
        new = self.run(old)
        if new is old:
            return method
        name = getattr(function, "__name__", "")
        # The successor may be of another class, with a method of its own.
        return getattr(new, name) if getattr(type(old), name, None) is function else types.MethodType(function, new)

    def _partial(self, partial: functools.partial[Any], shared: bool) -> Any:
        old = (partial.func, *partial.args, *partial.keywords.values())
        new = [self.run(part) for part in old]
        if not _same(old, new):
            partial = copy.copy(partial) if shared else partial
            args, values = new[1 : 1 + len(partial.args)], new[1 + len(partial.args) :]
            keywords = dict(zip(partial.keywords, values, strict=True))
            partial.__setstate__((new[0], tuple(args), keywords, partial.__dict__))  # type: ignore[attr-defined]
        return partial

    def _function(self, function: types.FunctionType, shared: bool) -> Any:
        if not shared:
            for cell in filled_cells(function):
                if self._refers_to_old(cell.cell_contents):
                    cell.cell_contents = self.run(cell.cell_contents)
            function.__defaults__, function.__kwdefaults__ = self._defaults(function)
            return function
        old = function.__closure__ or ()
        leading = [cell for cell in filled_cells(function) if self._refers_to_old(cell.cell_contents)]
        for cell in leading:
            self._cells.setdefault(id(cell), types.CellType())  # empty; functions that shared it go on sharing
        closure = tuple(self._cells.get(id(cell), cell) for cell in old)
        duplicate = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        functools.update_wrapper(duplicate, function)
        if not hasattr(function, "__wrapped__"):
            del duplicate.__wrapped__  # type: ignore[attr-defined]
        self._done[id(function)] = (function, duplicate)  # its cells may hold itself
        for cell in leading:
            self._cells[id(cell)].cell_contents = self.run(cell.cell_contents)
        duplicate.__defaults__, duplicate.__kwdefaults__ = self._defaults(function)
        return duplicate

    def _defaults(self, function: types.FunctionType) -> tuple[Any, Any]:
        values = function.__defaults__, function.__kwdefaults__
        return self.run(values[0]), self.run(values[1])


def _same(old: Any, new: Any) -> bool:
    return all(before is after for before, after in zip(old, new, strict=True))
