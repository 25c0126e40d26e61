"""Public functions called in inference mode: what they make must be trainable afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run outside of inference mode; tensors among its arguments that were made in it are copied.

    Copies of inference tensors, and so the copy of a model that was built in that mode, are ordinary ones.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*_ordinary(args), **_ordinary(kwargs))
        with torch.inference_mode(False):
            return function(*_ordinary(args), **_ordinary(kwargs))

    return run


def _ordinary(arguments: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, arguments)
