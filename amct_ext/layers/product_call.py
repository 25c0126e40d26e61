"""Calls of torch functions that multiply an input by a weight, intercepted while a custom forward runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class _Form:
    """How a function takes its operands: position and keyword of each.

    weight_is_in_out: its weight is [in, out], else [out, in]. neutral: keywords that must have these values, else the
    function computes more than a product.
    """

    kind: str
    x: tuple[int, str] = (0, "input")
    weight: tuple[int, str] = (1, "weight")
    bias: tuple[int, str] | None = (2, "bias")
    weight_is_in_out: bool = False
    neutral: Mapping[str, object] = field(default_factory=dict)


_MATMUL = _Form("Linear", weight=(1, "other"), bias=None, weight_is_in_out=True)
_MM = _Form("Linear", weight=(1, "mat2"), bias=None, weight_is_in_out=True)
_ADDMM = _Form(
    "Linear",
    (1, "mat1"),
    (2, "mat2"),
    (0, "input"),
    weight_is_in_out=True,
    neutral={"beta": 1, "alpha": 1, "out": None},
)
_FORMS: Mapping[Callable[..., object], _Form] = {
    F.conv1d: _Form("Conv1d"),
    F.conv2d: _Form("Conv2d"),
    F.conv3d: _Form("Conv3d"),
    F.conv_transpose1d: _Form("ConvTranspose1d"),
    F.conv_transpose2d: _Form("ConvTranspose2d"),
    F.conv_transpose3d: _Form("ConvTranspose3d"),
    F.linear: _Form("Linear"),
    torch.matmul: _MATMUL,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    torch.mm: _MM,
    Tensor.mm: _MM,
    torch.addmm: _ADDMM,
    Tensor.addmm: _ADDMM,
}


@dataclass(frozen=True)
class TensorLike:
    """Shape and type of a tensor that a forward was given."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Product:
    """The product in the forward of a module, as a run of the model found it.

    kind: layer type whose product it is. weight_is_in_out: its weight is [in, out]. weight_is_parameter: it is the
    parameter itself, not computed from it. args, kwargs: arguments of the forward, tensors by shape and type. parent:
    the module above that computes it, where the layer itself is not called.
    """

    kind: str
    weight_is_in_out: bool
    weight_is_parameter: bool
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    parent: str = ""


@dataclass(frozen=True, eq=False)
class ProductCall:
    """One call of such a function, with its operands as they were given."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def _form(self) -> _Form:
        return _FORMS[self.func]

    @property
    def kind(self) -> str:
        """The layer type whose product it is, 'Conv2d' or 'Linear'."""
        return self._form.kind

    @property
    def weight_is_in_out(self) -> bool:
        """Whether the weight is [in, out] as in ``x @ weight``; else it lies as in torch's layer of this kind."""
        return self._form.weight_is_in_out

    @property
    def x(self) -> Tensor:
        """The input."""
        found: Tensor = self._operand(self._form.x)
        return found

    @property
    def weight(self) -> Tensor:
        """The weight."""
        found: Tensor = self._operand(self._form.weight)
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias, None where the function adds none."""
        return None if self._form.bias is None else self._operand(self._form.bias)

    def argument(self, place: int, name: str, default: Any) -> Any:
        """An argument that is no operand."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The call with another input and another weight."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for (place, name), value in ((self._form.x, x), (self._form.weight, weight)):
            if name in kwargs:
                kwargs[name] = value
            else:
                args[place] = value
        return self.func(*args, **kwargs)

    def with_bias(self, bias: Tensor | None) -> ProductCall:
        """The call with another bias; only for functions that take one."""
        assert self._form.bias is not None
        place, name = self._form.bias
        if len(self.args) > place:
            return ProductCall(self.func, (*self.args[:place], bias, *self.args[place + 1 :]), self.kwargs)
        return ProductCall(self.func, self.args, {**self.kwargs, name: bias})

    def _operand(self, form: tuple[int, str]) -> Any:
        return self.argument(*form, None)


def product_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> ProductCall | None:
    """The call as a product of two tensors, None where it is none."""
    form = _FORMS.get(func)
    if form is None:
        return None
    kwargs = kwargs or _NOTHING
    if any(name in kwargs and kwargs[name] != value for name, value in form.neutral.items()):
        return None
    call = ProductCall(func, args, kwargs)
    return call if isinstance(call.x, Tensor) and isinstance(call.weight, Tensor) else None


class ProductMode(TorchFunctionMode):
    """While it is on, ``on_product`` computes each product whose weight is ``weight`` or derived from it.

    Tensors are compared as objects, which torch.compile can follow.
    """

    def __init__(self, weight: Tensor, on_product: Callable[[ProductCall], Tensor]) -> None:
        super().__init__()
        self._derived = [weight]
        self._on_product = on_product

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        call = product_call(func, args, kwargs)
        if call is not None and self._from_weight(call.weight):
            return self._on_product(call)
        result = func(*args, **(kwargs or {}))
        if any(self._from_weight(value) for value in pytree.tree_leaves((args, kwargs))):
            # a view or copy of it, or several at once (chunk, split, unbind)
            made = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
            self._derived += [value for value in made if not self._from_weight(value)]
        return result

    def _from_weight(self, value: object) -> bool:
        return any(value is known for known in self._derived)
