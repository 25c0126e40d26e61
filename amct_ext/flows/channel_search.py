"""`auto_channel_prune_search`: how many channels each layer can lose so that the model gets cheaper."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsFloat, TypeVar

from torch import nn

from amct_ext.common.files import write_atomic
from amct_ext.common.inference_mode import outside_inference_mode
from amct_ext.common.references import copy_model
from amct_ext.common.validation import check_record_name, check_types
from amct_ext.config.plan import Plan, resolve
from amct_ext.config.text import FilterPrune
from amct_ext.errors import ConfigError
from amct_ext.flows.build import float_copy
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.graph.trace import Graph, trace
from amct_ext.graph.traits import onnx_operator
from amct_ext.proto.text import close_matches
from amct_ext.prune import search_space
from amct_ext.prune.channels import apply_channels
from amct_ext.prune.cost import layer_costs
from amct_ext.prune.discovery import Discovery
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.search_config import SearchConfig, dumps, read_search_config
from amct_ext.prune.search_methods import (
    GateTaylorSensitivity,
    GreedySearch,
    SearchChannelBase,
    SensitivityBase,
    TaylorLossSensitivity,
)
from amct_ext.prune.selection import removal_count
from amct_ext.prune.walk import discover

__all__ = [
    "GateTaylorSensitivity",
    "GreedySearch",
    "SearchChannelBase",
    "SensitivityBase",
    "TaylorLossSensitivity",
    "auto_channel_prune_search",
]
Method = TypeVar("Method", SensitivityBase, SearchChannelBase)
logger = logging.getLogger("amct_ext")


@outside_inference_mode
def auto_channel_prune_search(
    model: nn.Module,
    config: str,
    input_data: list[Any],
    output_cfg: str,
    sensitivity: str | SensitivityBase = "TaylorLossSensitivity",
    search_alg: str | SearchChannelBase = "GreedySearch",
) -> None:
    """Search a pruning ratio for each layer and write them as a configuration for the create functions.

    ``config``: text file with

    * compress_ratio: how many times fewer bit operations; ascend_optimized, max_prune_ratio: limits on what goes;
    * test_iteration: samples used;
    * override_prune_cfg: layers to skip, or with given ratios.

    ``input_data``: a list [data, label]; data is what create takes as input_data and label a tensor, samples along axis
    0 of every tensor. ``output_cfg``: written atomically once all has succeeded. ``sensitivity``:
    "TaylorLossSensitivity", "GateTaylorSensitivity" (the written configuration then asks for `importance:
    GATE_TAYLOR`), or an object of a class derived from ``SensitivityBase``. ``search_alg``: "GreedySearch" or an object
    derived from ``SearchChannelBase``. The model is not changed.

    Errors: TypeError (argument types), ValueError (configuration values, override file, unknown sensitivity or
    algorithm, what an own one returns, nothing to search), RuntimeError (configuration text, too few samples, a model
    or loss that rejects them, labels that would have to be broadcast), FileNotFoundError. Source: AMCT's function of
    the same name; GateTaylorSensitivity is ours.
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
    measures = {each.__name__: each for each in (TaylorLossSensitivity, GateTaylorSensitivity)}
    measure = _built_in(sensitivity, measures, "sensitivity")
    algorithm = _built_in(search_alg, {"GreedySearch": GreedySearch}, "search_alg")
    settings = read_search_config(config)
    inner = float_copy(model).eval()
    search_space.split_samples(inner, input_data, settings.test_iteration)
    traced = search_space.take_samples(parse_inputs(inner, input_data[0]), slice(2))
    graph = trace(inner, traced)
    plan = _plan(settings, graph, inner)
    discovery = discover(graph, plan, inner)
    searched, given = _split(_single(discovery.prunable), settings, plan)
    groups = _viable(searched, settings, inner, discovery, traced)
    if not groups:
        raise ConfigError(f"{config}: no layer is left to search: all are skipped, given a ratio, or cannot be pruned")
    works = layer_costs(graph, inner, [(group, _lost(group, prune)) for group, prune in given])
    info, records = search_space.graph_info(works), search_space.search_records(groups)
    modules = dict(inner.named_modules())
    nodes = (search_space.SearchNode(n.name, onnx_operator(n, modules[n.module])) for n in graph.nodes if n.module)
    _set_up(measure, (search_space.SearchGraph(inner, tuple(nodes)), info), input_data, settings.test_iteration)
    measure.get_sensitivity(records)
    for record, group in zip(records, groups, strict=True):
        search_space.read_scores(record, group)
    search_space.write_costs(info, records)
    prune_config = (settings.compress_ratio, settings.ascend_optimized, settings.max_prune_ratio)
    removed = _removed(algorithm.channel_prune_search(info, records, prune_config), groups, settings.ascend_optimized)
    importance = "GATE_TAYLOR" if isinstance(measure, GateTaylorSensitivity) else None
    write_atomic(output_cfg, _output(settings, plan, dict(zip(groups, removed, strict=True)), given, importance))


def _output(
    settings: SearchConfig,
    plan: Plan,
    removed: Mapping[ChannelGroup, int],
    given: Sequence[tuple[ChannelGroup, FilterPrune]],
    importance: str | None,
) -> str:
    """The text of the configuration: found ratios by layer, given ones, and the layers that lose nothing.

    `importance`: how the channels were ranked that the ratios were found for; None: as the search does by default.
    """
    ratios = {
        member.name: FilterPrune(count / group.count, settings.ascend_optimized, importance)
        for group, count in removed.items()
        for member in group.producers
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
    return dumps(settings, ordered, untouched)


def _built_in(chosen: str | Method, known: Mapping[str, type[Method]], argument: str) -> Method:
    """The object given, or one of the built-in class of that name. Errors: ValueError (no such class)."""
    if not isinstance(chosen, str):
        return chosen
    if chosen not in known:
        raise ValueError(f"{argument}: '{chosen}' is not known; give {', '.join(known)} or an object of your own class")
    return known[chosen]()


def _set_up(
    measure: SensitivityBase,
    graph_tuple: tuple[search_space.SearchGraph, dict[str, dict[str, Any]]],
    input_data: list[Any],
    test_iteration: int,
) -> None:
    """AMCT's guide shows the method with `output_nodes` and, for PyTorch, without."""
    given = (graph_tuple, input_data, test_iteration)
    try:
        inspect.signature(measure.setup_initialization).bind(*given, None)
    except TypeError:
        measure.setup_initialization(*given)
    else:
        measure.setup_initialization(*given, None)


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


def _single(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups whose number of channels can be chosen alone: all outputs of layers, in equal subgroups."""
    owners: dict[str, set[int]] = {}
    for group in groups:
        for member in group.producers:
            owners.setdefault(member.name, set()).add(id(group))
    single = []
    for group in groups:
        name = group.producers[0].name
        if any(len(owners[member.name]) > 1 for member in group.producers) or group.tied_groups:
            logger.warning("%s is not searched and stays whole: parts of its channels go with other layers'", name)
        elif any(member.repeat != 1 for member in group.producers):
            logger.warning("%s is not searched and stays whole: one channel takes several of its outputs", name)
        elif group.subgroups is None or group.num_equal_subgroups is not None:
            single.append(group)
        else:
            logger.warning("%s is not searched and stays whole: its channels lie in unequal or mixed blocks", name)
    return single


def _lost(group: ChannelGroup, prune: FilterPrune) -> int:
    return max(0, removal_count(group.count, prune.ratio, prune.ascend_optimized, group.num_equal_subgroups or 1))


def _viable(
    groups: list[ChannelGroup], settings: SearchConfig, model: nn.Module, discovery: Discovery, traced: Inputs
) -> list[ChannelGroup]:
    """Leave out groups that create would drop: the pruned model fails or differs."""
    records = []
    for group in groups:
        num_subgroups = group.num_equal_subgroups or 1
        max_removed = search_space.removable(group, settings.ascend_optimized, settings.max_prune_ratio)[-1]
        size, removed = group.count // num_subgroups, max_removed // num_subgroups
        starts = range(0, group.count, size)
        records.append(group.record([start + index for start in starts for index in range(removed)]))
    kept = apply_channels(copy_model(model), discovery, records, traced)
    return [group for group, record in zip(groups, records, strict=True) if record in kept]


def _flags(given: Iterable[SupportsFloat]) -> list[int]:
    """Ones and zeros, whatever holds them; empty where there is anything else."""
    try:
        values = [] if isinstance(given, (str, bytes)) else [float(flag) for flag in given]
    except (TypeError, ValueError, RuntimeError):  # not numbers, or several in one place
        return []
    return [int(value) for value in values] if all(value in (0, 1) for value in values) else []


def _removed(chosen: object, groups: Sequence[ChannelGroup], ascend_optimized: bool) -> list[int]:
    """How many channels each group loses: of coupled producers the one that loses fewest counts, as for create."""
    if not isinstance(chosen, Mapping):
        raise ValueError(
            f"channel_prune_search must return a dict, layer -> 1 or 0 per channel, not {type(chosen).__name__}"
        )
    searched = {member.name: group for group in groups for member in group.producers}
    kept: dict[str, list[int]] = {}
    for name, flags in chosen.items():
        if name not in searched:
            raise ValueError(
                f"channel_prune_search returns '{name}', which is not searched{close_matches(str(name), searched)}"
            )
        count = searched[name].count
        kept[name] = _flags(flags)
        if len(kept[name]) != count:
            raise ValueError(f"channel_prune_search: '{name}' needs {count} flags, 1 (stays) or 0 (goes)")
        if not any(kept[name]):
            raise ValueError(f"channel_prune_search removes all {count} channels of '{name}'; one has to stay")
    counts = []
    for group in groups:
        asked = min(kept[member.name].count(0) if member.name in kept else 0 for member in group.producers)
        counts.append(asked)
        arrives = max(
            0, removal_count(group.count, asked / group.count, ascend_optimized, group.num_equal_subgroups or 1)
        )
        if arrives != asked:
            logger.warning(
                "%s: of the %d channels that the search removes, create will remove %d (ascend_optimized and grouped "
                "convolutions round)", group.producers[0].name, asked, arrives,
            )  # fmt: skip
    return counts
