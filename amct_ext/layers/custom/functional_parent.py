"""Modules that use the weights of layers below them functionally: ``F.linear(x, self.qkv.weight)``.

The layer is compressed as any other; its parent's forward runs under function modes that pass each product by such a
weight to the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

from torch import nn

from amct_ext.layers.custom.custom_forward import CustomForward
from amct_ext.layers.derive import derived_class, new_derived, take_attributes
from amct_ext.layers.product_call import ProductMode

_FUNCTIONAL_LAYERS = "amct_ext_functional_layers"


class FunctionalParent(nn.Module):
    """A module whose forward computes products of layers below it."""

    derived_from: tuple[type, type] | None = None  # this class and the user's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the user's class."""
        assert self.derived_from is not None
        with contextlib.ExitStack() as modes:
            for name in vars(self)[_FUNCTIONAL_LAYERS]:
                layer = self.get_submodule(name)
                if isinstance(layer, CustomForward):  # else skip: the layer was wrapped or replaced after create
                    modes.enter_context(ProductMode(layer.weight, layer.product))
            return self.derived_from[1].forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copies and pickles derive the class again, for no module holds the derived one."""
        get_state: Callable[[], object] = self.__getstate__
        return new_derived, self.derived_from, get_state()


def as_functional_parent(module: nn.Module, layers: Iterable[str]) -> nn.Module:
    """The module as the functional parent of these layers (names below it); do not use ``module`` afterwards."""
    new: nn.Module = object.__new__(derived_class(FunctionalParent, type(module)))
    take_attributes(new, module)
    vars(new)[_FUNCTIONAL_LAYERS] = tuple(layers)
    return new


def unwrap_functional_parent(parent: FunctionalParent) -> nn.Module:
    """The module of the user's class again."""
    assert parent.derived_from is not None
    plain: nn.Module = object.__new__(parent.derived_from[1])
    take_attributes(plain, parent)
    del vars(plain)[_FUNCTIONAL_LAYERS]
    return plain
