"""Another order of coupled channels, so that 2:4 masks along them cost less of the weights' magnitude."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import BATCH_NORM_TENSORS, LayerFamily, is_depthwise, kind_of
from amct_ext.config.plan import Plan
from amct_ext.config.text import FilterPrune, SparsePrune
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.trace import Graph
from amct_ext.prune.groups import INITIALIZER, ChannelGroup, Member
from amct_ext.prune.walk import discover

_ROUNDS = 128
_ROWS = 512  # of the weights that read a group; more are taken at even distances
# The halves of eight channels, the first channel in the first half.
_HALVES = torch.tensor([(0, *rest) for rest in itertools.combinations(range(1, 8), 3)])
_OTHER_HALVES = torch.tensor([[i for i in range(8) if i not in half] for half in _HALVES.tolist()])


_logger = logging.getLogger("amct_ext")


def asks_for_permutation(plan: Plan) -> bool:
    """Whether a layer of the plan is to have its input channels in another order."""
    return any(_permutes(plan, name) for name in plan.layers)


@torch.no_grad()
def permute_channels(model: nn.Module, graph: Graph, plan: Plan, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Reorder the channels that 2:4 layers read, where the graph shows all that produces and reads them; in place.

    What the model computes stays: producers' outputs, per-channel layers and readers' inputs are put into one order.
    That is checked on ``inputs``; a group whose new order changes an output goes back to its own, with a warning.
    Returns the orders, by the first producer of each group. The search draws from a generator of its own, so every rank
    of a job finds the same. Source: the idea is that of Pool and Yu 2021 (channel permutations for N:M sparsity); the
    search pairs groups of four at random and takes the best of all 35 ways to deal their eight channels.
    """
    everything = {name: replace(layer, prune=FilterPrune(0.5)) for name, layer in plan.layers.items()}
    modules, orders = dict(model.named_modules()), {}
    for group in discover(graph, replace(plan, layers=everything), model).prunable:
        if not _is_reorderable(group):
            continue
        rows = [rows for member in group.consumers for rows in _rows_of(member, group, plan, modules)]
        if rows and group.count >= 8:
            order = best_order(torch.cat(rows))
            if order != tuple(range(group.count)):
                orders[group] = order
    expected = inputs.evaluate(model) if orders else []
    undo = [_apply(group, order, modules) for group, order in orders.items()]
    if orders and not _agree(expected, inputs.evaluate(model)):
        for back in reversed(undo):
            back()
        orders = {
            group: order for group, order in orders.items() if _keeps(model, group, order, modules, expected, inputs)
        }
    return {group.producers[0].name: order for group, order in orders.items()}


def _is_reorderable(group: ChannelGroup) -> bool:
    """Whether layers alone make and read the channels, all that a layer makes, in the same order everywhere."""
    members = [*group.producers, *group.consumers]
    return group.subgroups is None and not any(m.index_pairs or m.type == INITIALIZER for m in members)


def _keeps(
    model: nn.Module,
    group: ChannelGroup,
    order: tuple[int, ...],
    modules: dict[str, nn.Module],
    expected: list[Tensor],
    inputs: Inputs,
) -> bool:
    """Put one group into its new order, and back again where an output differs."""
    undo = _apply(group, order, modules)
    if _agree(expected, inputs.evaluate(model)):
        return True
    undo()
    name = group.producers[0].name
    _logger.warning("%s: permute_channels would change what the model computes; its channels keep their order", name)
    return False


def _apply(group: ChannelGroup, order: tuple[int, ...], modules: dict[str, nn.Module]) -> Callable[[], None]:
    """Put a group into a new order; returns what puts it back."""
    before: dict[int, tuple[Tensor, Tensor]] = {}
    for tensor, axis, indices in _tensors_of(group, order, modules):
        # One tensor may be read twice by a layer (a concatenation of y and -y), or be produced and read along two axes.
        if tensor.data_ptr() not in before:
            before[tensor.data_ptr()] = tensor, tensor.clone()
        tensor.copy_(tensor.index_select(axis, torch.tensor(indices, device=tensor.device)))

    def undo() -> None:
        for tensor, old in before.values():
            tensor.copy_(old)

    return undo


def best_order(magnitudes: Tensor) -> tuple[int, ...]:
    """An order of the columns in which the two largest of every four in a row sum up to more.

    Args: magnitudes (rows, channels), not negative. Channels after the last whole group of four stay where they are.
    """
    rows = magnitudes[:: max(1, len(magnitudes) // _ROWS)].float()
    count = rows.shape[1] // 4
    order = torch.arange(4 * count)
    halves, others = _HALVES.to(rows.device), _OTHER_HALVES.to(rows.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_ROUNDS if count > 1 else 0):
        pairs = torch.randperm(count, generator=generator)[: count // 2 * 2].view(-1, 2)
        eight = order.view(count, 4)[pairs].flatten(1)
        values = rows[:, eight.to(rows.device)]  # rows, pairs, 8
        gains = torch.stack(
            [_kept(values[..., a]) + _kept(values[..., b]) for a, b in zip(halves, others, strict=True)]
        )
        first = gains[0]
        best = torch.where(gains.amax(0) > first * (1 + 1e-6), gains.argmax(0), 0).cpu()
        dealt = torch.cat([_HALVES[best], _OTHER_HALVES[best]], 1)
        order.view(count, 4)[pairs] = eight.gather(1, dealt).view(-1, 2, 4)
    return (*order.tolist(), *range(4 * count, magnitudes.shape[1]))


def _kept(fours: Tensor) -> Tensor:
    """Of (rows, pairs, 4) values: the sum of the two largest of each four, over the rows."""
    a, b, c, d = fours.unbind(-1)
    first, second = torch.maximum(a, b), torch.maximum(c, d)
    return torch.maximum(first + second, torch.maximum(a + b, c + d)).double().sum(0)


def _permutes(plan: Plan, name: str) -> bool:
    prune = plan.layers[name].prune if name in plan.layers else None
    return isinstance(prune, SparsePrune) and bool(prune.permute_channels)


def _rows_of(member: Member, group: ChannelGroup, plan: Plan, modules: dict[str, nn.Module]) -> Iterator[Tensor]:
    """The magnitudes (rows, channels) of a weight that is masked along the group's channels."""
    module = modules.get(member.name)
    if module is None or not _permutes(plan, member.name) or member.repeat != 1 or member.begin % 4:
        return
    kind = kind_of(module)
    if kind is None or not kind.sparse_prunable or getattr(module, "groups", 1) != 1:
        return
    weight = module.get_parameter("weight").detach().abs()
    along = weight.movedim(kind.weight_axes[0], -1).flatten(0, -2)
    yield along[:, member.begin : member.begin + group.count]


def _tensors_of(
    group: ChannelGroup, order: tuple[int, ...], modules: dict[str, nn.Module]
) -> Iterator[tuple[Tensor, int, list[int]]]:
    """Every tensor with the group's channels: itself, the axis, and the indices in their new order."""
    for member, produces in (*((m, True) for m in group.producers), *((m, False) for m in group.consumers)):
        module = modules.get(member.name)
        kind = None if module is None else kind_of(module)
        if module is None or kind is None:
            continue  # an operator without parameters
        names: tuple[str, ...] = ("weight",)
        axis = kind.weight_axes[1 if produces else 0]
        if kind.family is LayerFamily.BATCH_NORM:
            names = BATCH_NORM_TENSORS
        elif produces or is_depthwise(module):
            names, axis = ("weight", "bias"), kind.weight_axes[1] if produces else 0
        for name in names:
            tensor = getattr(module, name, None)
            if tensor is None:
                continue
            along = 0 if name != "weight" else axis
            # A depthwise weight or bias has `multiplier` indices for each that is read.
            multiplier = tensor.shape[along] // module.in_channels if is_depthwise(module) and not produces else 1
            begin, repeat = member.begin * multiplier, member.repeat * multiplier
            indices = list(range(tensor.shape[along]))
            indices[begin : begin + group.count * repeat] = [
                begin + channel * repeat + i for channel in order for i in range(repeat)
            ]
            yield tensor.detach(), along, indices


def _agree(expected: list[Tensor], seen: list[Tensor]) -> bool:
    """Whether outputs are equal but for the order of sums."""
    for a, b in zip(expected, seen, strict=True):
        if a.shape != b.shape:
            return False
        if a.is_floating_point() and not torch.allclose(
            a, b, rtol=1e-3, atol=1e-3 * float(a.abs().nan_to_num(posinf=0).max() if a.numel() else 0), equal_nan=True
        ):
            return False
    return True
