"""One plan per layer: the configuration's settings, resolved against the layers of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from amct_ext.common.layer_kinds import kind_named
from amct_ext.config.json import JsonConfig
from amct_ext.config.plan_checks import check_against_model, check_enabled, prune_active, quant_active
from amct_ext.config.profile import fill_data, fill_prune, fill_weight, scale_per_channel
from amct_ext.config.text import DataQuant, FilterPrune, Override, RetrainConfig, SparsePrune, WeightSettings
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ConfigError
from amct_ext.proto.text import close_matches

logger = logging.getLogger("amct_ext")


@dataclass(frozen=True)
class WeightQuant:
    """How a weight is quantised. algo: 'arq_retrain' (range of the current weight) or 'ulq_retrain' (learned scale).

    least_squares: scales of least squared error instead of the range; of learned scales at the start, of 'arq_retrain'
    with INT4 in every forward. lsq_gradient: a scale's gradient counts all weights that share it. compensate: INT4
    weights are changed at the end of the calibration, to make up for their rounding.
    """

    algo: str = "arq_retrain"
    num_bits: int = 8
    channel_wise: bool = True
    least_squares: bool = False
    lsq_gradient: bool = False
    compensate: bool = False


@dataclass(frozen=True)
class QuantPlan:
    """Quantisation of one layer."""

    data: DataQuant
    weight: WeightQuant


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer; quant None: it stays float, prune None: it stays whole."""

    name: str
    type: str
    quant: QuantPlan | None = None
    prune: FilterPrune | SparsePrune | None = None


@dataclass(frozen=True)
class Plan:
    """What happens to a model. `layers` holds every layer of the traits, in their order, also those left alone."""

    batch_num: int
    layers: dict[str, LayerPlan]
    fp16: bool = False
    write_shift_bit: bool = False
    quant_active: bool = False
    prune_active: bool = False


def resolve(config: RetrainConfig, traits: Mapping[str, LayerTraits], has_loss: bool = False) -> Plan:
    """The plan of every layer in `traits` (named_modules order). `has_loss`: there is one to rank channels by.

    Quantisation: override_layer_configs > override_layer_types > skip lists > global settings. Pruning: skip lists >
    override_layer_configs > override_layer_types > global settings. The two halves are looked up separately: an
    override that says nothing on pruning does not touch pruning, and the other way round; within one half it replaces,
    it does not merge. Errors: ConfigError. Source: AMCT's retraining configuration; differences: docs/differences.md.
    """
    check_against_model(config, traits)
    notes = _Notes()
    layers = {
        name: LayerPlan(name, trait.type, _quant(config, name, trait, notes), _prune(config, name, trait, has_loss))
        for name, trait in traits.items()
    }
    if all(layer.quant is None and layer.prune is None for layer in layers.values()):
        raise ConfigError(f"{config.locations.source}: every layer is skipped, nothing is left to compress")
    notes.log(config.locations.source)
    return Plan(
        config.batch_num,
        layers,
        fp16=config.fp16,
        write_shift_bit=config.write_shift_bit,
        quant_active=quant_active(config),
        prune_active=prune_active(config),
    )


def resolve_json(config: JsonConfig, traits: Mapping[str, LayerTraits]) -> Plan:
    """The plan of every layer in `traits`; layers that the file does not name stay float.

    Errors: ConfigError (layers the model does not have or that cannot be quantised, settings that do not go together,
    everything disabled).
    """
    named = [item.target for item in config.settings.override_layer_configs]
    problems = []
    for name in (*named, *config.disabled):
        if name not in traits:
            problems.append(f"the model has no layer '{name}'{close_matches(name, traits)}")
        elif name in named and not traits[name].quantizable:
            problems.append(
                f"layer '{name}' ({traits[name].type}) cannot be quantised: {traits[name].not_quantizable_reason}; "
                "set retrain_enable to false or remove it"
            )
    if problems:
        raise ConfigError("\n  ".join([f"{config.source}: the file does not fit the model:", *problems]))
    check_enabled(config)
    return resolve(config.settings, traits)


def after_pruning(plan: Plan, traits: Mapping[str, LayerTraits]) -> Plan:
    """The plan for the pruned model: INT4 weights whose input channels became odd take INT8 (a logged note)."""
    layers, notes = dict(plan.layers), _Notes()
    for name, layer in plan.layers.items():
        quant = layer.quant
        if quant is not None and quant.weight.num_bits == 4 and not traits[name].int4_weights:
            weight = replace(
                quant.weight,
                num_bits=8,
                least_squares=quant.weight.least_squares and quant.weight.algo == "ulq_retrain",
                compensate=False,
            )
            layers[name] = replace(layer, quant=replace(quant, weight=weight))
            notes.int4.append(name)
    notes.log("after channel pruning")
    return replace(plan, layers=layers)


@dataclass
class _Notes:
    """Layers that get something else than asked for; one message each, not one per layer."""

    int4: list[str] = field(default_factory=list)
    per_tensor: list[str] = field(default_factory=list)

    def log(self, source: str) -> None:
        if self.int4:
            logger.warning(
                "%s: INT8 instead of INT4 weights where the input channels are odd or grouped: %s",
                source, ", ".join(self.int4),
            )  # fmt: skip
        if self.per_tensor:
            logger.warning(
                "%s: channel_wise does not apply to Linear layers, their weights take one scale: %s",
                source, ", ".join(self.per_tensor),
            )  # fmt: skip


def _find(overrides: tuple[Override, ...], target: str) -> tuple[int, Override] | None:
    return next(((index, item) for index, item in enumerate(overrides) if item.target == target), None)


def _quant(config: RetrainConfig, name: str, trait: LayerTraits, notes: _Notes) -> QuantPlan | None:
    if not trait.quantizable:
        return None
    by_name, by_type = _find(config.override_layer_configs, name), _find(config.override_layer_types, trait.type)
    location: tuple[str | int, ...]
    if by_name is not None and by_name[1].quantizes:
        data, weight = by_name[1].data, by_name[1].weight
        location = ("override_layer_configs", by_name[0])
    elif by_type is not None and by_type[1].quantizes:
        data, weight = by_type[1].data, by_type[1].weight
        location = ("override_layer_types", by_type[0])
    elif quant_skipped(config, name, trait.type):
        return None
    else:
        data, weight, location = config.data, config.weight, ()
    data = fill_data(data or DataQuant(), config.profile)
    weight = fill_weight(weight or WeightSettings(), config.profile)
    bits = weight.num_bits
    if bits == 4 and not trait.int4_weights:
        bits = 8
        notes.int4.append(name)
    channel_wise = weight.channel_wise
    per_channel = _takes_scale_per_channel(trait.type) or scale_per_channel(config.profile)
    if channel_wise is None:
        channel_wise = per_channel
    elif channel_wise and not per_channel:
        if location[:1] == ("override_layer_configs",):
            raise ConfigError(
                f"{config.locations.at(*location)}: layer '{name}' is a {trait.type}, whose weight takes one scale; "
                "set channel_wise: false"
            )
        channel_wise = False
        notes.per_tensor.append(name)
    least_squares = weight.scale_start == "LEAST_SQUARES" and (weight.algo == "ulq_retrain" or bits == 4)
    compensate = bool(weight.compensate_rounding) and bits == 4
    lsq = weight.scale_gradient == "LSQ"
    return QuantPlan(data, WeightQuant(weight.algo, bits, channel_wise, least_squares, lsq, compensate))


def _takes_scale_per_channel(type_name: str) -> bool:
    kind = kind_named(type_name)
    return kind is None or kind.per_channel


def quant_skipped(config: RetrainConfig, name: str, type_name: str) -> bool:
    """Whether a layer that no override quantises stays float: the file quantises nothing by default, or skips it."""
    return (
        (config.data is None and config.weight is None)
        or name in (*config.skip_layers, *config.quant_skip_layers)
        or type_name in (*config.skip_layer_types, *config.quant_skip_types)
    )


def _prune(config: RetrainConfig, name: str, trait: LayerTraits, has_loss: bool) -> FilterPrune | SparsePrune | None:
    if name in (*config.skip_layers, *config.regular_prune_skip_layers):
        return None
    if trait.type in (*config.skip_layer_types, *config.regular_prune_skip_types):
        return None
    by_name, by_type = _find(config.override_layer_configs, name), _find(config.override_layer_types, trait.type)
    if by_name is not None and by_name[1].prune is not None:
        chosen = by_name[1].prune
    elif by_type is not None and by_type[1].prune is not None:
        chosen = by_type[1].prune
    elif config.prune is not None:
        chosen = config.prune
    else:
        return None
    eligible = trait.filter_prunable if isinstance(chosen, FilterPrune) else trait.sparse_prunable
    return fill_prune(chosen, config.profile, has_loss) if eligible else None
