"""Search for pruning ratios: which layers can lose how many channels so that the model gets so many times cheaper."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.arguments import check_record_name, check_types, unwrap
from amct_ext.config.plan import Plan, resolve
from amct_ext.config.text import FilterPrune
from amct_ext.errors import ConfigError, InputDataError, InvalidDataError, ModelError
from amct_ext.files import write_atomic
from amct_ext.flow.build import own_copy
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.trace import Graph, trace
from amct_ext.prune.channels import apply_channels, discover
from amct_ext.prune.choice import removal_count
from amct_ext.prune.cost import Cost
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.search_config import SearchConfig, dumps, read_search_config
from amct_ext.prune.search_methods import (
    GreedySearch,
    Sample,
    SearchChannelBase,
    SearchGroup,
    SensitivityBase,
    TaylorLossSensitivity,
)

__all__ = [
    "GreedySearch",
    "SearchChannelBase",
    "SearchGroup",
    "SensitivityBase",
    "TaylorLossSensitivity",
    "auto_channel_prune_search",
]


def auto_channel_prune_search(
    model: nn.Module,
    config: str,
    input_data: list[Any],
    output_cfg: str,
    sensitivity: str | SensitivityBase = "TaylorLossSensitivity",
    search_alg: str | SearchChannelBase = "GreedySearch",
) -> None:
    """Search a pruning ratio for each layer and write them as a configuration for the create functions.

    ``config``: text file with compress_ratio (how many times fewer bit operations), ascend_optimized, max_prune_ratio,
    test_iteration (samples used) and override_prune_cfg (layers to skip, or with given ratios). ``input_data``: a list
    [data, label]; data is what create takes as input_data and label a tensor, samples along axis 0 of every tensor.
    ``output_cfg``: written atomically once all has succeeded. The model is not changed. Errors: TypeError (argument
    types), ValueError (configuration values, override file, unknown sensitivity or algorithm, nothing to search),
    RuntimeError (configuration text, too few samples, a model that rejects them), FileNotFoundError. Source: AMCT's
    function of the same name.
    """
    check_types(
        model=(model, nn.Module),
        config=(config, str),
        input_data=(input_data, list),
        output_cfg=(output_cfg, str),
        sensitivity=(sensitivity, str, SensitivityBase),
        search_alg=(search_alg, str, SearchChannelBase),
    )
    check_record_name(output_cfg, "output_cfg")
    measure = _built_in(sensitivity, {"TaylorLossSensitivity": TaylorLossSensitivity}, "sensitivity")
    algorithm = _built_in(search_alg, {"GreedySearch": GreedySearch}, "search_alg")
    settings = read_search_config(config)
    samples, traced = _samples(unwrap(model), input_data, settings.test_iteration)
    inner = own_copy(model).eval()
    graph = trace(inner, traced)
    plan = _plan(settings, graph, inner)
    searched, given = _split(discover(graph, plan, inner).prunable, settings, plan)
    pairs = _viable([(group, _search_group(group, settings)) for group in searched], inner, graph, traced)
    open_groups, groups = [group for group, _ in pairs], [group for _, group in pairs]
    if not groups:
        raise ConfigError(f"{config}: no layer is left to search: all are skipped, given a ratio, or cannot be pruned")
    cost = Cost(graph, inner, open_groups, [(group, _lost(group, prune)) for group, prune in given])
    try:
        scores = measure.get_sensitivity(inner, groups, samples)
    except RuntimeError as error:
        if isinstance(error, (ModelError, InvalidDataError)):
            raise
        raise InputDataError(f"the model or the loss rejects input_data: {error}") from error
    _check_scores(scores, groups)
    removed = algorithm.channel_prune_search(groups, scores, cost, settings.compress_ratio)
    _check_counts(removed, groups)
    ratios = {
        name: FilterPrune(count / group.channels, settings.ascend_optimized)
        for group, count in zip(groups, removed, strict=True)
        for name in group.producers
        if count
    }
    # A layer coupled to one whose ratio is given follows it.
    for coupled, prune in given:
        ratios |= {m.name: prune for m in coupled.producers if not settings.given(m.name, plan.layers[m.name].type)}
    fixed = [name for name, layer in plan.layers.items() if layer.prune and settings.given(name, layer.type)]
    untouched = [
        name for name, layer in plan.layers.items() if layer.prune and name not in ratios and name not in fixed
    ]
    ordered = {name: ratios[name] for name in plan.layers if name in ratios}
    write_atomic(output_cfg, dumps(settings, ordered, untouched))


def _built_in(chosen: Any, known: dict[str, Any], argument: str) -> Any:
    if not isinstance(chosen, str):
        return chosen
    if chosen not in known:
        raise ValueError(f"{argument}: '{chosen}' is not known; give {', '.join(known)} or an object of your own class")
    return known[chosen]()


def _samples(model: nn.Module, input_data: list[Any], wanted: int) -> tuple[list[Sample], tuple[Any, ...]]:
    """The samples for the sensitivity, one by one, and arguments (two samples at most) to trace the model with.

    Arguments are tuples with a dict of arguments by name at the end, where there are any.
    """
    if len(input_data) != 2:
        raise InputDataError(f"input_data must be [data, label], not a list of {len(input_data)}")
    data, label = input_data
    inputs = parse_inputs(model, data).in_order(model)
    tensors = inputs.tensors()
    if not all(isinstance(item, Tensor) and item.dim() > 0 for item in (*tensors, label)):
        raise InputDataError("input_data must hold tensors with samples along axis 0: [data, label]")
    have = min(len(item) for item in (*tensors, label))
    if have < wanted:
        raise InputDataError(f"test_iteration is {wanted}, but input_data holds {have} sample(s)")

    def cut(samples: slice) -> tuple[Any, ...]:
        return inputs.map(lambda item: item[samples]).as_tuple()

    return [(cut(slice(i, i + 1)), label[i : i + 1]) for i in range(wanted)], cut(slice(2))


def _plan(settings: SearchConfig, graph: Graph, model: nn.Module) -> Plan:
    """A plan that prunes every searchable layer; the ratio stands for 'to be found'."""
    return resolve(replace(settings.override, prune=FilterPrune(0.5, settings.ascend_optimized)), graph.traits(model))


def _split(
    groups: Sequence[ChannelGroup], settings: SearchConfig, plan: Plan
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, FilterPrune]]]:
    """Groups to search, and those in which the override file gives a producer's ratio (the smallest one counts)."""
    searched, given = [], []
    for group in groups:
        named = [settings.given(member.name, plan.layers[member.name].type) for member in group.producers]
        prunes = [prune for prune in named if prune is not None]
        if prunes:
            ascend = any(prune.ascend_optimized for prune in prunes)
            given.append((group, FilterPrune(min(prune.ratio for prune in prunes), ascend)))
        else:
            searched.append(group)
    return searched, given


def _lost(group: ChannelGroup, prune: FilterPrune) -> int:
    return max(0, removal_count(group.count, prune.ratio, prune.ascend_optimized, group.blocks or 1))


def _search_group(group: ChannelGroup, settings: SearchConfig) -> SearchGroup:
    """Only counts that create arrives at from the written ratio: multiples of 16 stay, blocks lose alike."""
    n, blocks = group.count, group.blocks or 1
    fewest = n * (1 - settings.max_prune_ratio) - 1e-6 * n
    counts = [
        count
        for count in range(1, n)
        if n - count >= fewest and removal_count(n, count / n, settings.ascend_optimized, blocks) == count
    ]
    consumers = tuple(dict.fromkeys(member.name for member in group.consumers))
    return SearchGroup(tuple(member.name for member in group.producers), consumers, n, (0, *counts), blocks)


def _viable(
    pairs: list[tuple[ChannelGroup, SearchGroup]], model: nn.Module, graph: Graph, traced: tuple[Any, ...]
) -> list[tuple[ChannelGroup, SearchGroup]]:
    """Leave out groups that create would drop: the model fails its trial forward without their channels."""
    records = []
    for group, search in pairs:
        size, gone = group.count // search.blocks, search.counts[-1] // search.blocks
        records.append(group.record([block * size + place for block in range(search.blocks) for place in range(gone)]))
    kept = apply_channels(copy.deepcopy(model), graph, records, traced)
    return [pair for pair, record in zip(pairs, records, strict=True) if record in kept]


def _check_scores(scores: Sequence[Tensor], groups: Sequence[SearchGroup]) -> None:
    if len(scores) != len(groups):
        raise ValueError(f"the sensitivity gave {len(scores)} score vectors for {len(groups)} groups")
    for group, values in zip(groups, scores, strict=True):
        if not isinstance(values, Tensor) or tuple(values.shape) != (group.channels,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"the sensitivity of {group.producers[0]} must have shape ({group.channels},), not {shape}"
            )
        if not bool(torch.isfinite(values).all()):
            raise InvalidDataError(f"the sensitivity of {group.producers[0]} holds NaN or Inf: check weights and data")


def _check_counts(removed: Sequence[int], groups: Sequence[SearchGroup]) -> None:
    if len(removed) != len(groups):
        raise ValueError(f"the search gave {len(removed)} counts for {len(groups)} groups")
    for group, count in zip(groups, removed, strict=True):
        if not math.isfinite(count) or count not in group.counts:
            raise ValueError(f"the search removes {count} channels of {group.producers[0]}: not one of its counts")
