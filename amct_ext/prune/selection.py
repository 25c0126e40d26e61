"""Choice of channels: how many of a group are removed, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from amct_ext.config.plan import Plan
from amct_ext.config.text import FilterPrune
from amct_ext.ops import filter_norms
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.importance import group_norms, produced_rows

ASCEND_MULTIPLE = 16
MEASURES = ("BALANCED_L2", "GROUP_L2", "GATE_TAYLOR")  # each uses more of the network than the one before


def removal_count(channels: int, ratio: float, ascend_optimized: bool, num_subgroups: int = 1) -> int:
    """How many of `channels` are removed. Not positive: none.

    The number to remove is rounded half to even; what remains is rounded up to a multiple of 16 where ascend_optimized,
    then down to a multiple of the subgroups, and at least one multiple stays.
    """
    remain = channels - round(channels * ratio)
    if ascend_optimized:
        remain = ASCEND_MULTIPLE * max(1, math.ceil(remain / ASCEND_MULTIPLE))
    if num_subgroups > 1:
        remain = num_subgroups * (remain // num_subgroups)
    return channels - (remain or num_subgroups)


def measure_of(group: ChannelGroup, plan: Plan) -> str:
    """How the channels of a group are ranked: of what its producers ask for, the measure listed last in MEASURES."""
    return max((prune.importance or MEASURES[0] for prune in _settings(group, plan)), key=MEASURES.index)


def importance(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """AMCT's importance of each output channel: L2 norms, brought to 0..1 per weight, summed over coupled weights."""
    total = torch.zeros(())
    for weight in weights:
        norms = filter_norms(weight.detach()) / (weight.numel() / weight.shape[0])
        low, high = norms.min(), norms.max()
        if bool(high > low):  # else all its filters have the same norm: skipped
            total = total.to(norms) + (norms - low) / (high - low)
    return total.expand(weights[0].shape[0])


def least_important(scores: Tensor, ratio: float, ascend_optimized: bool, num_subgroups: int = 1) -> tuple[int, ...]:
    """The channels to remove, ascending: equally many in each subgroup; among equals the first."""
    subgroups = torch.arange(num_subgroups).repeat_interleave(len(scores) // num_subgroups)
    return tuple(_least_important(scores, subgroups, ratio, ascend_optimized).tolist())


def _least_important(scores: Tensor, subgroups: Tensor, ratio: float, ascend_optimized: bool) -> Tensor:
    """`subgroups`: the subgroup of each channel; they lose the same share. -1: in none."""
    removed = []
    sizes = subgroups[subgroups >= 0].unique(return_counts=True)[1].tolist()
    unit = math.gcd(*sizes)
    for subgroup, size in [(-1, int((subgroups < 0).sum())), *enumerate(sizes)]:
        if subgroup < 0:
            count = removal_count(size, ratio, ascend_optimized) if size else 0
        else:
            units = sum(sizes) // unit
            count = removal_count(sum(sizes), ratio, ascend_optimized, units) // units * (size // unit)
        if count > 0:
            indices = (subgroups == subgroup).nonzero().flatten()
            removed.append(indices[scores[indices].argsort(stable=True)[:count]])
    return torch.cat(removed).sort().values if removed else torch.zeros(0, dtype=torch.int64)


def select_channels(
    group: ChannelGroup, plan: Plan, model: nn.Module, scores: Mapping[ChannelGroup, Tensor] = MappingProxyType({})
) -> dict[ChannelGroup, tuple[int, ...]]:
    """The channels to remove, of a group and of its tied groups.

    The producers' smallest ratio counts, and rounding if any asks for it. `scores`: of GATE_TAYLOR. Without them (a
    dry run without a loss) GROUP_L2 stands in for it.
    """
    groups = group.tied_groups or [group]
    settings = [prune for each in groups for prune in _settings(each, plan)]
    ratio = min(prune.ratio for prune in settings)
    ascend = any(prune.ascend_optimized for prune in settings)
    ranked = torch.cat([_scores(each, plan, model, scores.get(each)).cpu() for each in groups])
    subgroups = torch.cat(
        [torch.full((each.count,), -1) if each.subgroups is None else each.subgroups for each in groups]
    )
    removed = torch.zeros(len(ranked), dtype=torch.bool)
    removed[_least_important(ranked, subgroups, ratio, ascend)] = True
    parts = removed.split([each.count for each in groups])
    return {each: tuple(part.nonzero().flatten().tolist()) for each, part in zip(groups, parts, strict=True)}


def _scores(group: ChannelGroup, plan: Plan, model: nn.Module, measured: Tensor | None) -> Tensor:
    if measured is not None:
        return measured
    if measure_of(group, plan) == "BALANCED_L2":
        return importance([produced_rows(member, group.count, model) for member in group.producers])
    return group_norms(group, model)


def _settings(group: ChannelGroup, plan: Plan) -> list[FilterPrune]:
    prunes = [plan.layers[member.name].prune for member in group.producers]
    return [prune for prune in prunes if isinstance(prune, FilterPrune)]
