"""Choice of channels: how many of a group go, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amct_ext.config.plan import Plan
from amct_ext.config.text import FilterPrune
from amct_ext.ops import filter_norms
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.importance import finite_weight, group_norms

ASCEND_MULTIPLE = 16
MEASURES = ("BALANCED_L2", "GROUP_L2", "GATE_TAYLOR")  # in this order each looks at more


def removal_count(channels: int, ratio: float, ascend_optimized: bool, blocks: int = 1) -> int:
    """How many of `channels` go. Not positive: none.

    The number that goes is rounded half to even; what remains is rounded up to a multiple of 16 where ascend_optimized,
    then down to a multiple of the blocks, and at least one multiple stays.
    """
    remain = channels - round(channels * ratio)
    if ascend_optimized:
        remain = ASCEND_MULTIPLE * max(1, math.ceil(remain / ASCEND_MULTIPLE))
    if blocks > 1:
        remain = blocks * (remain // blocks)
    return channels - (remain or blocks)


def measure_of(group: ChannelGroup, plan: Plan) -> str:
    """How the channels of a group are ranked: of what its producers ask for, the measure that looks at most."""
    return max((prune.importance or MEASURES[0] for prune in _settings(group, plan)), key=MEASURES.index)


def importance(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """AMCT's importance of each output channel: L2 norms, brought to 0..1 per weight, summed over coupled weights."""
    total = torch.zeros(())
    for weight in weights:
        norms = filter_norms(weight.detach()) / (weight.numel() / weight.shape[0])
        low, high = norms.min(), norms.max()
        if bool(high > low):  # else all filters weigh the same and this weight has no say
            total = total.to(norms) + (norms - low) / (high - low)
    return total.expand(weights[0].shape[0])


def least_important(scores: torch.Tensor, ratio: float, ascend_optimized: bool, blocks: int = 1) -> tuple[int, ...]:
    """The channels that go, ascending: in each of the equal blocks equally many; among equals the first."""
    size = len(scores) // blocks
    count = removal_count(len(scores), ratio, ascend_optimized, blocks) // blocks
    if count <= 0:
        return ()
    order = scores.reshape(blocks, size).argsort(dim=1, stable=True)[:, :count]
    places = order + torch.arange(blocks, device=order.device).unsqueeze(1) * size
    return tuple(sorted(places.flatten().tolist()))


def select_channels(group: ChannelGroup, plan: Plan, model: nn.Module, scores: Tensor | None = None) -> tuple[int, ...]:
    """The channels of a group that go: the producers' smallest ratio counts, and rounding if any asks for it.

    `scores`: of GATE_TAYLOR. Without them (a dry run without a loss) GROUP_L2 stands in for it.
    """
    settings = _settings(group, plan)
    if scores is None:
        if measure_of(group, plan) == "BALANCED_L2":
            scores = importance([finite_weight(member, model) for member in group.producers])
        else:
            scores = group_norms(group, model)
    ratio = min(prune.ratio for prune in settings)
    ascend = any(prune.ascend_optimized for prune in settings)
    return least_important(scores.cpu(), ratio, ascend, group.blocks or 1)


def _settings(group: ChannelGroup, plan: Plan) -> list[FilterPrune]:
    prunes = [plan.layers[member.name].prune for member in group.producers]
    return [prune for prune in prunes if isinstance(prune, FilterPrune)]
