"""Sizes that a forward takes from somewhere else: which channels must lose as many as which others.

`x.view(b, n, c)` may take c from the input of an attention, and a module may use one attribute for queries and values.
What such an operator reshapes must lose as many channels as what the size is taken from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from amct_ext.graph.inputs import Inputs
from amct_ext.graph.recorder import op_name
from amct_ext.graph.values import Node, Value
from amct_ext.prune.discovery import Discovery, EqualRemoval
from amct_ext.prune.rules.types import Maps
from amct_ext.prune.runs import PrunedRun
from amct_ext.prune.sizes import SIZE_ATTRIBUTES, SPLITS, expected_shape, scopes_of

_logger = logging.getLogger("amct_ext")

VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias")


@dataclass(frozen=True)
class _SizeMismatch:
    """A size that a node was given: of which output and axis, in the unpruned model, as given, and as it should be."""

    node: Node
    output: Value
    axis: int
    unpruned: int
    given: int
    right: int


class _SizeCorrectingRun(PrunedRun):
    """The forward of the pruned model; views and splits with wrong sizes are recorded and get the right ones."""

    def __init__(self, model: nn.Module, inputs: Inputs, discovery: Discovery, removed_mask: Tensor) -> None:
        super().__init__(model, inputs, discovery, removed_mask, sums=False)
        self.mismatches: list[_SizeMismatch] = []

    def evaluate(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = self.expected()
        if node is None or node.op != op_name(func) or node.op not in (*VIEWS, *SPLITS):
            return super().evaluate(func, args, kwargs)
        x: Tensor = args[0]
        if node.op in VIEWS:
            shape = self.right_shape(x, args[1])
            return super().evaluate(func, args, kwargs) if shape is None else x.reshape(shape)
        dim = node.args["dim"] % x.dim()
        right = [expected_shape(value, self.discovery, self.removed_mask)[dim] for value in node.outputs]
        sizes = args[1] if isinstance(args[1], list) else [args[1]] * len(right)
        differs = self._compare(
            [(v, dim, size, s) for v, size, s in zip(node.outputs, sizes, right, strict=False)], node
        )
        return torch.ops.aten.split_with_sizes(x, right, dim) if differs else super().evaluate(func, args, kwargs)

    def right_shape(self, x: Tensor, given: Sequence[int]) -> tuple[int, ...] | None:
        """The shape that the next node, a view of `x`, should be given; None where it is given that, or not known."""
        node = self.expected()
        if node is None or node.op not in VIEWS or len(given) != len(node.outputs[0].shape):
            return None
        with self._unrecorded():
            right = expected_shape(node.outputs[0], self.discovery, self.removed_mask)
        if math.prod(right) != x.numel():  # another view than the recorded one
            return None
        here = [(node.outputs[0], axis, *sizes) for axis, sizes in enumerate(zip(given, right, strict=True))]
        return right if self._compare(here, node) else None

    def _compare(self, sizes: list[tuple[Value, int, int, int]], node: Node) -> bool:
        """Record wrong sizes; sizes: (output, axis, given, right). Whether there are any."""
        mismatches = [
            _SizeMismatch(node, v, axis, v.shape[axis], given, s) for v, axis, given, s in sizes if given not in (-1, s)
        ]
        if not mismatches or any(right < 0 for *_, right in sizes):
            return False
        self.mismatches += mismatches
        return True


class _SizeCorrectingReshapes(TorchFunctionMode):
    """Reshapes check their sizes before any operator runs."""

    def __init__(self, forward: _SizeCorrectingRun) -> None:
        super().__init__()
        self._forward = forward

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (Tensor.reshape, torch.reshape) and not kwargs:
            given = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            shape = self._forward.right_shape(args[0], given)
            if shape is not None:
                return func(args[0], shape)
        return func(*args, **(kwargs or {}))


def find_equal_removals(
    model: nn.Module,
    inputs: Inputs,
    discovery: Discovery,
    removed_mask: Tensor,
    unpruned: Mapping[tuple[str, str], object],
) -> list[EqualRemoval]:
    """What the forward of the pruned model needs; `unpruned`: size attributes before, by module and name."""
    inputs = inputs.copied()
    forward = _SizeCorrectingRun(model, inputs, discovery, removed_mask)
    try:
        with _SizeCorrectingReshapes(forward):
            forward.run(inputs)
    except Exception as error:  # what was found so far counts
        _logger.debug("the forward with right sizes ends early: %s", error)
    modules = dict(model.named_modules())
    result: dict[bytes, EqualRemoval] = {}
    for mismatch in forward.mismatches:
        rows = _rows(mismatch, discovery)
        partners = _by_attribute(mismatch, discovery, modules, unpruned) or _by_shape(mismatch, discovery, removed_mask)
        for partner in partners:
            width = partner.shape[1]
            if rows.numel() % width == 0:
                both = torch.cat([rows.reshape(-1, width), partner]).unique(dim=0)
                result.setdefault(both.numpy().tobytes(), EqualRemoval(both, mismatch.node.name))
    return list(result.values())


def size_attributes(model: nn.Module) -> dict[tuple[str, str], object]:
    """Attributes of a model that may hold sizes, by module and name."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key in SIZE_ATTRIBUTES
    }


def _rows(mismatch: _SizeMismatch, discovery: Discovery) -> Tensor:
    """The channels along the axis; zeros, which stay, where there are none."""
    for item in discovery.maps.get(mismatch.output, ()):
        if item.axis == mismatch.axis and item.ids.shape[item.axis] == mismatch.unpruned:
            return item.rows()
    return torch.zeros(1, mismatch.unpruned, dtype=torch.int64)


def _by_attribute(
    mismatch: _SizeMismatch,
    discovery: Discovery,
    modules: Mapping[str, nn.Module],
    unpruned: Mapping[tuple[str, str], object],
) -> list[Tensor]:
    """What else an attribute is the size of, that has the size given."""
    for scope in scopes_of(mismatch.node.scope):
        for key, now in vars(modules[scope]).items():
            pairs = zip(_integers(unpruned.get((scope, key))), _integers(now), strict=False)
            if (mismatch.unpruned, mismatch.given) in pairs:
                rows = [
                    rows
                    for rows, output in _of_size(discovery, scope, mismatch.unpruned)
                    if output is not mismatch.output
                ]
                if rows:
                    return rows
    return []


def _of_size(discovery: Discovery, scope: str, size: int) -> Iterator[tuple[Tensor, Value]]:
    """Channels along axes of a size that views and splits in and below a module make."""
    for node in discovery.graph.nodes:
        if node.op in (*VIEWS, *SPLITS) and scope in scopes_of(node.scope):
            for output in node.outputs:
                for item in discovery.maps.get(output, ()):
                    if item.ids.shape[item.axis] == size:
                        yield item.rows(), output


def _by_shape(mismatch: _SizeMismatch, discovery: Discovery, removed_mask: Tensor) -> list[Tensor]:
    """The channels of an earlier value, in the module or around it, that has the size given or a multiple of it."""
    for scope in scopes_of(mismatch.node.scope):
        best: tuple[int, Tensor] | None = None
        for value, maps in _earlier(mismatch.node, scope, discovery):
            for item in maps:
                size = value.shape[item.axis]
                if (
                    size % mismatch.unpruned
                    or item.ids.shape[item.axis] != size
                    or set(item.varying_axes) != {item.axis}
                ):
                    continue
                times, left = size // mismatch.unpruned, expected_shape(value, discovery, removed_mask)[item.axis]
                if left != size and left // times == mismatch.given and (best is None or times < best[0]):
                    best = times, item.rows()
        if best is not None:
            return [best[1]]
    return []


def _earlier(node: Node, scope: str, discovery: Discovery) -> Iterable[tuple[Value, Maps]]:
    """What nodes in and below a module read and make, up to a node."""
    for other in discovery.graph.nodes:
        if other is node:
            return
        if not scope or f"{other.module or other.scope}.".startswith(f"{scope}."):
            for value in (*other.inputs, *other.outputs):
                if value is not None and value in discovery.maps:
                    yield value, discovery.maps[value]


def _integers(value: object) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]
