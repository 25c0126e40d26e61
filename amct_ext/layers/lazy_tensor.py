"""The base of tensors whose values are computed when something reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map_only

_T = TypeVar("_T")


class LazyTensor(Tensor):
    """A tensor without memory of its own. A subclass says in ``__torch_dispatch__`` what an op makes of it.

    Autograd sees an ordinary tensor: its nodes, versions and hooks are torch's. Below autograd, each op that is given
    one reaches ``__torch_dispatch__``. The methods here are those that read memory without an op.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def without_memory(cls, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Self:
        """A new one on the CPU. C++ code that takes its address without the dispatcher raises RuntimeError."""
        new: Self = Tensor._make_wrapper_subclass(cls, shape, stride, dtype=dtype, device=torch.device("cpu"))
        torch._C._set_throw_on_mutable_data_ptr(new)
        return new

    def materialize(self) -> Tensor:
        """The plain tensor of the values, without their history."""
        raise NotImplementedError

    def writable_values(self) -> Tensor:
        """The plain tensor of the values for one who may also write to them."""
        return self.materialize()

    def replace(self, value: Tensor) -> None:
        """Take the memory of ``value``, a plain tensor; earlier aliases keep theirs."""
        raise NotImplementedError

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        same = value.shape == self.shape and value.dtype == self.dtype and value.device == self.device
        if not same:
            raise RuntimeError(
                f"data of shape {tuple(value.shape)}, {value.dtype}, cannot take the place of a result of shape "
                f"{tuple(self.shape)}, {self.dtype}, whose values are not computed yet"
            )
        own = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype)
        self.replace(own.copy_(value.detach()))

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        if self.requires_grad:
            raise RuntimeError("a result that requires gradients gives no numpy array: call detach() first")
        return self.writable_values().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.materialize().tolist()

    def data_ptr(self) -> int:
        return self.writable_values().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.writable_values().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.writable_values().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            raise RuntimeError("a result in a graph of gradients cannot be copied in depth: call detach() first")
        return copy.deepcopy(self.materialize(), memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduce: Callable[[SupportsIndex], Any] = self.materialize().__reduce_ex__
        return reduce(protocol)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        represent: Callable[..., str] = self.materialize().__repr__
        return represent(*args, **kwargs)


def map_lazy(value: _T, kind: type[LazyTensor], function: Callable[..., Tensor]) -> _T:
    """``value`` with ``function`` of each lazy tensor of this kind, in all containers that torch's pytrees know."""
    if type(value) is Tensor or not tree_any(lambda leaf: isinstance(leaf, kind), value):
        return value
    mapped: _T = tree_map_only(kind, function, value)
    return mapped
