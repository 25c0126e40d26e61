"""What objects hold: attributes, slots, the items of containers, the cells of functions."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import torch

COMPUTED = (torch.Tensor, torch.jit.ScriptModule, torch.jit.ScriptFunction)
LEAVES: tuple[type, ...] = (
    *weakref.ProxyTypes, *COMPUTED, type, types.ModuleType, types.BuiltinFunctionType, types.NoneType, bool, int,
    float, complex, str, bytes, bytearray, range, torch.dtype, torch.device,
)  # fmt: skip
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_CONSTANTS = frozenset(
    {type, types.ModuleType, types.BuiltinFunctionType, types.NoneType, bool, int, float, complex, str, bytes}
)
_EXACT_CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set, frozenset, deque))
PLAIN = (*CONTAINERS, types.FunctionType, types.MethodType, functools.partial, weakref.ref)


def slots_of(obj: Any) -> Iterator[tuple[Any, Any]]:
    """Each filled slot (``__slots__``) of an object: its descriptor and its value."""
    descriptors = _slots.get(type(obj))
    if descriptors is None:
        slotted = [vars(base) for base in type(obj).__mro__ if "__slots__" in vars(base)]
        found = [value for body in slotted for value in body.values() if isinstance(value, types.MemberDescriptorType)]
        descriptors = _slots[type(obj)] = tuple(found)
    for descriptor in descriptors:
        try:
            yield descriptor, descriptor.__get__(obj)
        except AttributeError:
            continue


# By class, the descriptors of its slots: most have none, which takes longer to find out than all else.
_slots: weakref.WeakKeyDictionary[type, tuple[types.MemberDescriptorType, ...]] = weakref.WeakKeyDictionary()


def leads_nowhere(value: Any) -> bool:
    """Whether a value is a constant or an empty container, as most attributes of a module are."""
    kind = type(value)
    return kind in _CONSTANTS or (kind in _EXACT_CONTAINERS and not value)


def attributes_of(obj: Any) -> dict[str, Any]:
    """The dictionary of an object's attributes, whatever its class makes of the access to them."""
    try:
        found = object.__getattribute__(obj, "__dict__")
    except (AttributeError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def contents_of(obj: Any) -> Iterator[Any]:
    """What a plain container or function holds."""
    if isinstance(obj, types.FunctionType):
        yield from (cell.cell_contents for cell in filled_cells(obj))
        yield from (obj.__defaults__, obj.__kwdefaults__)
    elif isinstance(obj, types.MethodType):
        yield from (obj.__self__, obj.__func__)
    elif isinstance(obj, functools.partial):
        yield from (obj.func, obj.args, obj.keywords)
    elif isinstance(obj, weakref.ref):
        yield obj()
    elif isinstance(obj, CONTAINERS):
        yield from obj
        if isinstance(obj, dict):
            yield from obj.values()


def filled_cells(function: types.FunctionType) -> Iterator[types.CellType]:
    for cell in function.__closure__ or ():
        try:
            _ = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        yield cell
