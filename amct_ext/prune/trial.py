"""Is a smaller model right? Its forward beside that of the whole model, node by node, and the outputs of both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from amct_ext.graph.inputs import Inputs
from amct_ext.graph.recorder import Recorder, op_name
from amct_ext.graph.run import tensors_in
from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.discovery import Discovery
from amct_ext.prune.removal import Removal
from amct_ext.prune.rescale import rescaling
from amct_ext.prune.rules.operators import GROUP_NORM, LAYER_NORMS, NORMS, PRODUCTS, STATISTICS
from amct_ext.prune.rules.types import dims_of
from amct_ext.prune.sizes import expected_shape, kept

_logger = logging.getLogger("amct_ext")

_ALIKE = 2e-5  # difference of two weighted sums, over the sum of magnitudes

Checksum = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Where two forwards part: a node of the whole model's (None: not known), and what is wrong there."""

    node: Node | None
    reason: str


class _Observed(Recorder):
    """A recorded forward that compares itself with the recording of the whole model."""

    def __init__(self, model: nn.Module, inputs: Inputs, found: Discovery, gone: Tensor, sums: bool) -> None:
        super().__init__(model, inputs)
        self.found, self.gone, self._sums = found, gone, sums
        self.checksums: list[list[Checksum | None]] = []

    def expected(self) -> Node | None:
        """The node of the whole model that comes next."""
        nodes = self.found.graph.nodes
        return nodes[len(self.nodes)] if len(self.nodes) < len(nodes) else None


class Pruned(_Observed):
    """The forward of the smaller model."""

    def observe(self, node: Node, results: list[Tensor]) -> None:
        if self._sums:
            self.checksums.append([_checksum(tensor) for tensor in results])

    def difference(self) -> Difference | None:
        """The first node with another shape than the whole model's with its channels gone."""
        for old, new in zip(self.found.graph.nodes, self.nodes, strict=False):
            if old.op != new.op:
                return None  # what runs depends on what was computed; shapes tell nothing from here on
            for before, after in zip(old.outputs, new.outputs, strict=False):
                shape = expected_shape(before, self.found, self.gone)
                if self.found.maps.get(before) and shape != after.shape:
                    return Difference(old, f"{old.name} ({old.op}) has shape {list(after.shape)}, not {list(shape)}")
        return None


class Masked(_Observed):
    """The forward of the whole model in which readers ignore what is gone, and statistics leave it out."""

    _random = False

    def observe(self, node: Node, results: list[Tensor]) -> None:
        if not self._sums:
            return
        old = self.found.graph.nodes[len(self.nodes) - 1] if len(self.nodes) <= len(self.found.graph.nodes) else None
        alike = old is not None and old.op == node.op and len(old.outputs) == len(results)
        kept_parts = [self._kept(value, tensor) for value, tensor in zip(old.outputs, results)] if alike else []  # type: ignore[union-attr] # noqa: B905
        self.checksums.append([None if part is None else _checksum(part) for part in kept_parts])

    def is_comparable(self) -> bool:
        """Whether the smaller model has to compute the same.

        The operators were those of the recording, so each was masked by its own channels, and no random numbers were
        drawn for removed channels: the smaller model draws fewer, and so others.
        """
        same = [node.op for node in self.nodes] == [node.op for node in self.found.graph.nodes]
        return same and not self._random

    def given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        old = self.expected()
        if old is None or old.module is None or not old.inputs:
            return None
        if args and isinstance(args[0], Tensor):
            return (self._zeroed(old.inputs[0], args[0]), *args[1:]), kwargs
        if not args and isinstance(kwargs.get("input"), Tensor):
            return args, {**kwargs, "input": self._zeroed(old.inputs[0], kwargs["input"])}
        return None

    def evaluate(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        old = self.expected()
        if old is None or old.op != op_name(func):
            return super().evaluate(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._random = self._random or any(self._maps(value) for value in old.outputs)
        if old.op in PRODUCTS:
            given = iter(old.inputs)
            return func(*_mapped(args, lambda t: self._zeroed(next(given), t)), **kwargs)
        if self._leaves_out(old):
            return self._of_the_kept(old, func, args, kwargs)
        return super().evaluate(func, args, kwargs)

    def _maps(self, value: Value | None) -> tuple[ChannelMap, ...]:
        maps = self.found.maps.get(value, ()) if value is not None else ()
        return tuple(item for item in maps if bool(self.gone[item.ids].any()))

    def _mask(self, value: Value | None, tensor: Tensor) -> Tensor | None:
        mask: Tensor | None = None
        for item in self._maps(value):
            part = kept(item, self.gone).to(tensor.device)
            mask = part if mask is None else mask & part
        return mask if mask is None or mask.dim() == tensor.dim() else None

    def _zeroed(self, value: Value | None, tensor: Tensor) -> Tensor:
        mask = self._mask(value, tensor)
        return (
            tensor
            if mask is None
            else torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
        )

    def _kept(self, value: Value, tensor: Tensor) -> Tensor | None:
        mask = self._mask(value, tensor)
        if mask is None:
            return tensor
        shape = expected_shape(value, self.found, self.gone)
        return None if -1 in shape else tensor.masked_select(mask.expand_as(tensor)).reshape(shape)

    def _leaves_out(self, node: Node) -> bool:
        """Whether a node computes over channels that are gone."""
        if not node.inputs or not self._maps(node.inputs[0]):
            return False
        if node.op in NORMS:
            return True
        assert node.inputs[0] is not None
        touched = dims_of(node, len(node.inputs[0].shape))
        return node.op in STATISTICS and any(
            {*item.varying, item.axis} & touched for item in self._maps(node.inputs[0])
        )

    def _of_the_kept(self, old: Node, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = iter(old.inputs)

        def small(tensor: Tensor) -> Tensor:
            value = next(given)
            part = None if value is None else self._kept(value, tensor)
            return tensor if part is None else part

        cut = list(_mapped(args, small))
        if old.op in LAYER_NORMS:
            cut[1] = list(cut[0].shape[-len(cut[1]) :])
        elif old.op == GROUP_NORM:
            cut[4] = cut[0].shape[1]
        result = func(*cut, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        spread = [self._spread(value, tensor) for value, tensor in zip(old.outputs, outputs, strict=True)]
        return spread[0] if isinstance(result, Tensor) else tuple(spread)

    def _spread(self, value: Value, small: Tensor) -> Tensor:
        """A result for the kept channels in its full shape, zero elsewhere."""
        mask = self._mask(value, small)
        if mask is None:
            return small
        whole = small.new_zeros(value.shape)
        return whole.masked_scatter(mask.expand_as(whole), small)


def run_pruned(
    model: nn.Module, inputs: Inputs, found: Discovery, gone: Tensor, sums: bool = False
) -> tuple[Pruned, list[Tensor], Difference | None]:
    """A forward of the smaller model: its recording, outputs, and what is wrong with it.

    `sums`: take the checksums that `parting` compares.
    """
    inputs = inputs.copied()
    pruned = Pruned(model, inputs, found, gone, sums)
    try:
        outputs = [tensor.clone() for tensor in tensors_in(pruned.run(inputs))]
    except Exception as error:
        node = pruned.expected()
        where = f"{node.name} ({node.op}) fails: " if node is not None else ""
        return pruned, [], Difference(node, f"{where}{type(error).__name__}: {error}")
    dims, wanted = [tensor.dim() for tensor in outputs], [len(value.shape) for value in found.graph.outputs]
    if dims != wanted:  # sizes are not compared: how many boxes a detector returns depends on the weights
        return pruned, outputs, Difference(None, f"its outputs would have {dims} dimensions instead of {wanted}")
    return pruned, outputs, pruned.difference()


@dataclass(frozen=True)
class Fitted:
    """Outputs of a smaller model, what is wrong with it, and values that it has multiplied by other factors."""

    outputs: list[Tensor]
    difference: Difference | None
    scaled: Collection[Value] = ()


def run_fitted(model: nn.Module, inputs: Inputs, found: Discovery, gone: Tensor, removal: Removal) -> Fitted:
    """A forward of the smaller model, which `removal` has made; numbers that depend on its size are made up for."""
    pruned, outputs, difference = run_pruned(model, inputs, found, gone)
    if difference is not None:
        return Fitted(outputs, difference)
    change = rescaling(model, found, gone, pruned.nodes)
    if change.missing is not None:
        reason = f"{change.missing.name} ({change.missing.op}) uses their number, and no layer makes up for that"
        return Fitted(outputs, Difference(_with_channels(change.missing, found), reason))
    if not change.factors:
        return Fitted(outputs, None)
    removal.undo()
    removal.scale(change.factors)
    removal.apply()
    _, outputs, difference = run_pruned(model, inputs, found, gone)
    return Fitted(outputs, difference, change.values)


def _with_channels(node: Node, found: Discovery) -> Node:
    """A node, or the one before it that works on channels."""
    while not any(value and found.maps.get(value) for value in node.inputs):
        before = next((value.producer for value in node.inputs if value and value.producer), None)
        if before is None:
            break
        node = before
    return node


def run_masked(
    model: nn.Module, inputs: Inputs, found: Discovery, gone: Tensor, sums: bool = False
) -> tuple[Masked, list[Tensor]]:
    """A forward of the whole model without the influence of what is gone."""
    inputs = inputs.copied()
    masked = Masked(model, inputs, found, gone, sums)
    return masked, [tensor.clone() for tensor in tensors_in(masked.run(inputs))]


def largest_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of two lists of outputs, over the largest magnitude of each; inf where shapes differ."""
    worst = 0.0
    if len(got) != len(wanted):
        return torch.inf
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return torch.inf
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            same = torch.isfinite(a) & torch.isfinite(b)
            if not bool((same | (a == b) | (a.isnan() & b.isnan())).all()):
                return torch.inf
            difference = (a - b).abs()[same]
            if difference.numel():
                worst = max(worst, float(difference.max()) / max(float(b.abs()[same].max()), 1e-30))
    return worst


def parting(pruned: Pruned, masked: Masked, scaled: Collection[Value] = ()) -> Difference:
    """The first node at which two forwards compute something else, but for values of another scale."""
    for old, got, wanted in zip(pruned.found.graph.nodes, pruned.checksums, masked.checksums, strict=False):
        for value, a, b in zip(old.outputs, got, wanted, strict=False):
            if value in scaled or _is_scaled(value, pruned.found):
                continue
            if a is not None and b is not None and abs(a[0] - b[0]) > _ALIKE * max(a[1], b[1]):
                return Difference(old, f"{old.name} ({old.op}) computes something else without them")
    return Difference(None, "it computes something else without them")


def _is_scaled(value: Value, found: Discovery) -> bool:
    """Whether queries are in a value: the smaller model has them multiplied by a factor."""
    return any(
        bool(torch.isin(item.ids, rows).any()) for item in found.maps.get(value, ()) for _, rows in found.attended
    )


def _checksum(tensor: Tensor) -> Checksum | None:
    """A sum in which each place has another weight, and that of the magnitudes."""
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
