"""Why a layer is left float, or unpruned: nothing asks for it, it is not eligible, or its channels are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from amct_ext.common.layer_kinds import FILTER_PRUNABLE, SPARSE_PRUNABLE
from amct_ext.config.json import JsonConfig
from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import FilterPrune, RetrainConfig, SparsePrune
from amct_ext.config.traits import LayerTraits
from amct_ext.model_surgery.session import Session

_NOT_REACHED = "no settings of the configuration reach it"
_QUANT_SKIPS = (("skip_layers", "skip_layer_types"), ("quant_skip_layers", "quant_skip_types"))
_PRUNE_SKIPS = (("skip_layers", "skip_layer_types"), ("regular_prune_skip_layers", "regular_prune_skip_types"))


@dataclass(frozen=True)
class LayerReasons:
    """Empty where the layer is quantised, or pruned or made 2:4 sparse."""

    not_quantized: str = ""
    not_pruned: str = ""


def layer_reasons(session: Session, name: str) -> LayerReasons:
    """The reasons for one layer of a compressed model, by its name at create.

    Derived from what create or restore found in the unpruned float model; a skipped layer's reason names the list of
    the configuration. Channel groups that only the comparison rejects are not known here.
    """
    plan, found = session.plan, session.findings
    layer = plan.layers[name]
    if name in found.uncalled:
        why = LayerReasons(found.uncalled[name], found.uncalled[name])
    else:
        trait = found.traits[name]
        why = LayerReasons(
            _not_quantized(plan, layer, trait, found.config),
            _not_pruned(plan, layer, trait, found.config, found.unpruned_reasons),
        )
    stayed = session.excluded.get(name)
    if stayed is None:
        return why
    return LayerReasons(stayed, stayed if isinstance(layer.prune, SparsePrune) else why.not_pruned)


def _not_quantized(plan: Plan, layer: LayerPlan, trait: LayerTraits, config: RetrainConfig | JsonConfig) -> str:
    if layer.quant is not None:
        return ""
    if not trait.quantizable:
        return trait.not_quantizable_reason
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
    config: RetrainConfig | JsonConfig,
    kept: Mapping[str, str],
) -> str:
    if isinstance(layer.prune, FilterPrune):
        return kept.get(layer.name, "")
    if layer.prune is not None:
        return ""
    if not plan.prune_active:
        return "no pruning is asked for"
    if trait.type not in (*FILTER_PRUNABLE, *SPARSE_PRUNABLE):
        return f"{trait.type} takes neither channel pruning nor 2:4 sparsity"
    if not (trait.filter_prunable or trait.sparse_prunable):
        return trait.not_quantizable_reason or trait.not_sparse_reason
    skipped = "" if isinstance(config, JsonConfig) else _skipped(layer, config, _PRUNE_SKIPS)
    if not skipped and not trait.filter_prunable and not trait.not_sparse_reason:
        kind = "depthwise, its channels follow from its input's" if trait.type in FILTER_PRUNABLE else trait.type
        return f"its own output channels are not removed ({kind})"
    if not skipped and trait.type in SPARSE_PRUNABLE and not trait.sparse_prunable:
        return trait.not_sparse_reason
    return skipped or _NOT_REACHED


def _skipped(layer: LayerPlan, config: RetrainConfig, lists: tuple[tuple[str, str], ...]) -> str:
    """Which skip list of the configuration names the layer or its type, '' where none does."""
    for by_name, by_type in lists:
        if layer.name in getattr(config, by_name):
            return f"named in {by_name}"
        if layer.type in getattr(config, by_type):
            return f"its type {layer.type} is named in {by_type}"
    return ""
