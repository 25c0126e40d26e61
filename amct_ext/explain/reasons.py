"""Why a layer is left float, or whole: asked for nothing, not eligible, or held by what reads its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from amct_ext.common.layer_kinds import FILTER_PRUNABLE, SPARSE_PRUNABLE
from amct_ext.config.json import JsonConfig
from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import FilterPrune, RetrainConfig
from amct_ext.config.traits import LayerTraits
from amct_ext.graph.trace import Graph
from amct_ext.prune.channels import discover

_NOT_REACHED = "no settings of the configuration reach it"
_QUANT_SKIPS = (("skip_layers", "skip_layer_types"), ("quant_skip_layers", "quant_skip_types"))
_PRUNE_SKIPS = (("skip_layers", "skip_layer_types"), ("regular_prune_skip_layers", "regular_prune_skip_types"))


@dataclass(frozen=True)
class LayerReasons:
    """Empty where the layer is quantised, or pruned or made 2:4 sparse."""

    not_quantised: str = ""
    not_pruned: str = ""


def reasons(
    graph: Graph,
    traits: Mapping[str, LayerTraits],
    plan: Plan,
    model: nn.Module,
    config: RetrainConfig | JsonConfig | None = None,
) -> dict[str, LayerReasons]:
    """The reasons for every layer of the traits; `graph` is the trace of the unpruned float `model`.

    `config`, where given, is the one the plan was made of: then a skipped layer's reason names the list. Channel groups
    that only the trial forward rejects are not known here.
    """
    held = discover(graph, plan, model).why_not() if plan.prune_active else {}
    return {
        name: LayerReasons(
            _not_quantised(plan, plan.layers[name], trait, config),
            _not_pruned(plan, plan.layers[name], trait, config, held),
        )
        for name, trait in traits.items()
    }


def _not_quantised(plan: Plan, layer: LayerPlan, trait: LayerTraits, config: RetrainConfig | JsonConfig | None) -> str:
    if layer.quant is not None:
        return ""
    if not trait.quantizable:
        return trait.why_not_quantizable
    if not plan.quant_active:
        return "no quantisation is asked for"
    if isinstance(config, JsonConfig):
        listed = layer.name in config.disabled
        return f"retrain_enable is false in {config.source}" if listed else f"{config.source} does not name it"
    return _skipped(layer, config, _QUANT_SKIPS) or _NOT_REACHED


def _not_pruned(
    plan: Plan,
    layer: LayerPlan,
    trait: LayerTraits,
    config: RetrainConfig | JsonConfig | None,
    held: Mapping[str, str],
) -> str:
    if isinstance(layer.prune, FilterPrune):
        return held.get(layer.name, "")
    if layer.prune is not None:
        return ""
    if not plan.prune_active:
        return "no pruning is asked for"
    if trait.type not in (*FILTER_PRUNABLE, *SPARSE_PRUNABLE):
        return f"{trait.type} takes neither channel pruning nor 2:4 sparsity"
    if not (trait.filter_prunable or trait.sparse_prunable):
        return trait.why_not_quantizable or trait.why_not_sparse
    skipped = "" if isinstance(config, JsonConfig) else _skipped(layer, config, _PRUNE_SKIPS)
    if not skipped and not trait.filter_prunable and not trait.why_not_sparse:
        kind = "depthwise, its channels follow from its input's" if trait.type in FILTER_PRUNABLE else trait.type
        return f"its own output channels are not removed ({kind})"
    if not skipped and trait.type in SPARSE_PRUNABLE and not trait.sparse_prunable:
        return trait.why_not_sparse
    return skipped or _NOT_REACHED


def _skipped(layer: LayerPlan, config: RetrainConfig | None, lists: tuple[tuple[str, str], ...]) -> str:
    if config is None:
        return ""
    for by_name, by_type in lists:
        if layer.name in getattr(config, by_name):
            return f"named in {by_name}"
        if layer.type in getattr(config, by_type):
            return f"its type {layer.type} is named in {by_type}"
    return ""
