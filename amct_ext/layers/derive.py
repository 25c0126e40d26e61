"""Compressed classes of layers whose float class is a user's: derived from both when they are needed."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from amct_ext.common.held_objects import slots_of


def derived_class(compressed: type, user: type) -> type:
    """The class with the bases ``compressed`` and the user's own, so that its members and isinstance tests stay.

    There is one per pair while anything uses it. Errors: whatever the user's metaclass raises.
    """
    known: type
    for known in type.__subclasses__(user):
        if vars(known).get("derived_from") == (compressed, user):
            return known
    body = {"derived_from": (compressed, user), "__module__": user.__module__}
    return types.new_class(f"Compressed{user.__name__}", (compressed, user), {}, lambda names: names.update(body))


def new_derived(compressed: type, user: type) -> Any:
    """An empty layer of the derived class, for copies and pickles, which fill it."""
    return object.__new__(derived_class(compressed, user))


def take_attributes(new: nn.Module, layer: nn.Module) -> None:
    """Give a new layer the attributes of ``layer``: the same parameters, hooks and values."""
    vars(new).update(vars(layer), _modules=dict(layer._modules))
    for descriptor, value in slots_of(layer):
        descriptor.__set__(new, value)
