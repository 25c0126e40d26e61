"""Modules that multiply by the weights of layers below them without calling these layers.

An attention that passes ``self.qkv.weight`` to a function, say. The layer is compressed as any other; its module's
forward runs under modes that hand each product by such a weight to the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

from torch import nn

from amct_ext.layers.derive import derived_class, new_derived, take_attributes
from amct_ext.layers.own_forward import OwnForward
from amct_ext.layers.product_call import ProductMode

_HOSTED = "amct_ext_hosted"


class Host(nn.Module):
    """A module whose forward computes products of layers below it."""

    derived_from: tuple[type, type] | None = None  # this class and the user's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the user's class."""
        assert self.derived_from is not None
        with contextlib.ExitStack() as modes:
            for name in vars(self)[_HOSTED]:
                layer = self.get_submodule(name)
                if isinstance(layer, OwnForward):  # else something was put around it, or in its place
                    modes.enter_context(ProductMode(layer.weight, layer.product))
            return self.derived_from[1].forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copies and pickles derive the class again, for no module holds the derived one."""
        get_state: Callable[[], object] = self.__getstate__
        return new_derived, self.derived_from, get_state()


def host_of(module: nn.Module, layers: Iterable[str]) -> nn.Module:
    """The module as a host of these layers (names below it); it must not be used itself afterwards."""
    new: nn.Module = object.__new__(derived_class(Host, type(module)))
    take_attributes(new, module)
    vars(new)[_HOSTED] = tuple(layers)
    return new


def plain_host(host: Host) -> nn.Module:
    """The module of the user's class again."""
    assert host.derived_from is not None
    plain: nn.Module = object.__new__(host.derived_from[1])
    take_attributes(plain, host)
    del vars(plain)[_HOSTED]
    return plain
