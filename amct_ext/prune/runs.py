"""Recorded forwards of the pruned model and of the unpruned one with removed channels masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from amct_ext.graph.inputs import Inputs
from amct_ext.graph.operators import GROUP_NORM, LAYER_NORMS, NORMS, PRODUCTS, SOFTMAXES, STATISTICS
from amct_ext.graph.recorder import Recorder, op_name
from amct_ext.graph.run import tensors_in
from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.discovery import Discovery
from amct_ext.prune.rules.types import dims_of
from amct_ext.prune.sizes import expected_shape, keep_mask

Checksum = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """The first node of the unpruned model at which two forwards differ (None: not known), and how."""

    node: Node | None
    reason: str


class _ComparedRun(Recorder):
    """A recorded forward beside the recording of the unpruned model."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, discovery: Discovery, removed_mask: Tensor, sums: bool
    ) -> None:
        super().__init__(model, inputs)
        self.discovery, self.removed_mask, self._sums = discovery, removed_mask, sums
        self.checksums: list[list[Checksum | None]] = []

    def expected(self) -> Node | None:
        """The next node of the unpruned model's recording."""
        nodes = self.discovery.graph.nodes
        return nodes[len(self.nodes)] if len(self.nodes) < len(nodes) else None


class PrunedRun(_ComparedRun):
    """The forward of the pruned model."""

    def observe(self, node: Node, results: list[Tensor]) -> None:
        if self._sums:
            self.checksums.append([_checksum(tensor) for tensor in results])

    def difference(self) -> Difference | None:
        """The first node whose shape is not that of the unpruned model without the removed channels."""
        for old, new in zip(self.discovery.graph.nodes, self.nodes, strict=False):
            if old.op != new.op:
                return None  # data-dependent control flow: shapes can no longer be compared
            for before, after in zip(old.outputs, new.outputs, strict=False):
                shape = expected_shape(before, self.discovery, self.removed_mask)
                if self.discovery.maps.get(before) and shape != after.shape:
                    return Difference(old, f"{old.name} ({old.op}) has shape {list(after.shape)}, not {list(shape)}")
        return None


class MaskedRun(_ComparedRun):
    """The forward of the unpruned model in which removed channels have no influence: zero, and not in statistics."""

    _random = False

    def observe(self, node: Node, results: list[Tensor]) -> None:
        if not self._sums:
            return
        old = (
            self.discovery.graph.nodes[len(self.nodes) - 1]
            if len(self.nodes) <= len(self.discovery.graph.nodes)
            else None
        )
        kept_parts: list[Tensor | None] = []
        if old is not None and old.op == node.op and len(old.outputs) == len(results):
            kept_parts = [self._select_kept(value, tensor) for value, tensor in zip(old.outputs, results, strict=True)]
        self.checksums.append([None if part is None else _checksum(part) for part in kept_parts])

    def is_comparable(self) -> bool:
        """Whether the pruned model has to compute the same.

        The operators were those of the recording, so each was masked by its own channels, and no random numbers were
        drawn for removed channels: the pruned model draws fewer, and so others.
        """
        same = [node.op for node in self.nodes] == [node.op for node in self.discovery.graph.nodes]
        return same and not self._random

    def replace_layer_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        old = self.expected()
        if old is None or old.module is None or not old.inputs:
            return None
        if args and isinstance(args[0], Tensor):
            return (self._zero_removed(old.inputs[0], args[0]), *args[1:]), kwargs
        if not args and isinstance(kwargs.get("input"), Tensor):
            return args, {**kwargs, "input": self._zero_removed(old.inputs[0], kwargs["input"])}
        return None

    def evaluate(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        old = self.expected()
        if old is None or old.op != op_name(func):
            return super().evaluate(func, args, kwargs)
        if _draws_random_numbers(func, args, kwargs):
            self._random = self._random or any(self._maps(value) for value in old.outputs)
        if old.op in PRODUCTS:
            given = iter(old.inputs)
            return func(*_mapped(args, lambda t: self._zero_removed(next(given), t)), **kwargs)
        if self._reduces_removed(old):
            return self._evaluate_on_kept(old, func, args, kwargs)
        return super().evaluate(func, args, kwargs)

    def _maps(self, value: Value | None) -> tuple[ChannelMap, ...]:
        maps = self.discovery.maps.get(value, ()) if value is not None else ()
        return tuple(item for item in maps if bool(self.removed_mask[item.ids].any()))

    def _mask(self, value: Value | None, tensor: Tensor) -> Tensor | None:
        mask: Tensor | None = None
        for item in self._maps(value):
            part = keep_mask(item, self.removed_mask).to(tensor.device)
            mask = part if mask is None else mask & part
        return mask if mask is None or mask.dim() == tensor.dim() else None

    def _zero_removed(self, value: Value | None, tensor: Tensor) -> Tensor:
        mask = self._mask(value, tensor)
        return (
            tensor
            if mask is None
            else torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
        )

    def _select_kept(self, value: Value, tensor: Tensor) -> Tensor | None:
        mask = self._mask(value, tensor)
        if mask is None:
            return tensor
        shape = expected_shape(value, self.discovery, self.removed_mask)
        return None if -1 in shape else tensor.masked_select(mask.expand_as(tensor)).reshape(shape)

    def _reduces_removed(self, node: Node) -> bool:
        """Whether a node is a norm or statistic over removed channels."""
        if not node.inputs or not self._maps(node.inputs[0]):
            return False
        if node.op in NORMS:
            return True
        assert node.inputs[0] is not None
        touched = dims_of(node, len(node.inputs[0].shape))
        return node.op in (*STATISTICS, *SOFTMAXES) and any(
            {*item.varying_axes, item.axis} & touched for item in self._maps(node.inputs[0])
        )

    def _evaluate_on_kept(self, old: Node, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = iter(old.inputs)

        def small(tensor: Tensor) -> Tensor:
            value = next(given)
            part = None if value is None else self._select_kept(value, tensor)
            return tensor if part is None else part

        reduced = list(_mapped(args, small))
        if old.op in LAYER_NORMS:
            reduced[1] = list(reduced[0].shape[-len(reduced[1]) :])
        elif old.op == GROUP_NORM:
            reduced[4] = reduced[0].shape[1]
        result = func(*reduced, **kwargs)
        # Also over all channels, for its memory format: the operators behind it may depend on that.
        outputs, full = (list(tensors_in(each)) for each in (result, func(*args, **kwargs)))
        spread = [self._scatter_kept(*parts) for parts in zip(old.outputs, outputs, full, strict=True)]
        return spread[0] if isinstance(result, Tensor) else tuple(spread)

    def _scatter_kept(self, value: Value, small: Tensor, full: Tensor) -> Tensor:
        """A result for the kept channels in the shape and memory format of the full one, zero elsewhere."""
        mask = self._mask(value, small)
        if mask is None:
            return small
        spread = torch.zeros_like(full)
        return spread.masked_scatter_(mask.expand_as(spread), small)


def _checksum(tensor: Tensor) -> Checksum | None:
    """A sum with a different weight for each element, and the sum of magnitudes."""
    if not tensor.is_floating_point() or tensor.is_sparse or not tensor.numel():
        return None
    values = tensor.detach().flatten().double().nan_to_num(0, 0, 0)
    weights = torch.linspace(1, 2, len(values), dtype=torch.float64, device=values.device)
    products = values * weights
    return float(products.sum()), float(products.abs().sum())


def _mapped(args: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments of an op with its tensors changed, in order."""
    if isinstance(args, Tensor):
        return change(args)
    if isinstance(args, (list, tuple)):
        return type(args)(_mapped(item, change) for item in args)
    return args


def _draws_random_numbers(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call draws random numbers; attention does only with a dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given != 0)
    return True
