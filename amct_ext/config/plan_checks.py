"""Does a configuration fit a model? All that is wrong is said at once, each with its line in the file.

Two rules are looser than AMCT's, so what it accepts is accepted: an entry of skip_layers must name a layer that some
method can take (AMCT: quantisation and the global pruning method both), and regular_prune_skip_* is held against all
pruning methods the file uses (AMCT: the global one only).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from amct_ext.common.layer_kinds import FILTER_PRUNABLE, QUANTIZABLE, QUANTIZABLE_BY_AMCT, SPARSE_PRUNABLE
from amct_ext.config.json import JsonConfig
from amct_ext.config.profile import goes_beyond_amct
from amct_ext.config.text import DataQuant, FilterPrune, Override, RetrainConfig, SparsePrune, WeightSettings
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ConfigError
from amct_ext.proto.text import close_matches

_BIT_PAIRS = ((8, 8), (16, 8), (8, 4))  # bits of activations and weights that go together

logger = logging.getLogger("amct_ext")


def _overrides(config: RetrainConfig) -> tuple[Override, ...]:
    return config.override_layer_configs + config.override_layer_types


def quant_active(config: RetrainConfig) -> bool:
    """Whether the file asks for quantisation: global settings, even empty ones, or those of any override."""
    return config.data is not None or config.weight is not None or any(item.quantizes for item in _overrides(config))


def prune_active(config: RetrainConfig) -> bool:
    """Whether the file asks for pruning or sparsity: prune_config, global or in any override."""
    return bool(_methods(config))


def _methods(config: RetrainConfig) -> set[type]:
    chosen = [config.prune, *(item.prune for item in _overrides(config))]
    return {type(item) for item in chosen if item is not None}


def check_without_model(config: RetrainConfig) -> None:
    """Errors: ConfigError with every entry that no model could make right, or an empty job."""
    _raise(list(_by_itself(config)))


def check_against_model(config: RetrainConfig, traits: Mapping[str, LayerTraits]) -> None:
    """Errors: ConfigError with every entry that names an unknown or unsuitable layer or type, or an empty job."""
    problems = list(_by_itself(config))
    if quant_active(config) or prune_active(config):
        problems += [*_skipped_layers(config, traits), *_layer_overrides(config, traits)]
    if not problems and quant_active(config) and not any(trait.quantizable for trait in traits.values()):
        reasons = sorted({trait.not_quantizable_reason for trait in traits.values()} - {""})
        problems.append(
            f"{config.locations.source}: quantisation is asked for, but no layer of the model can be quantised"
            + (f" ({'; '.join(reasons)})" if reasons else "")
        )
    if not problems and prune_active(config) and not any(_prunable(config, trait) for trait in traits.values()):
        problems.append(
            f"{config.locations.source}: pruning is asked for, but no layer of the model can be pruned that way"
        )
    _raise(problems)


def check_enabled(config: JsonConfig) -> None:
    """Raise ConfigError where a JSON configuration quantises no layer."""
    if not config.settings.override_layer_configs:
        raise ConfigError(f"{config.source}: every layer is disabled, nothing is left to quantise")


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems:", *problems]))


def _prunable(config: RetrainConfig, trait: LayerTraits) -> bool:
    methods = _methods(config)
    return (FilterPrune in methods and trait.filter_prunable) or (SparsePrune in methods and trait.sparse_prunable)


def _any_method(trait: LayerTraits) -> bool:
    return trait.quantizable or trait.filter_prunable or trait.sparse_prunable


def _by_itself(config: RetrainConfig) -> Iterator[str]:
    if not (quant_active(config) or prune_active(config)):
        yield (
            f"{config.locations.source}: nothing to do; give retrain_data_quant_config, retrain_weight_quant_config or "
            "prune_config, for the whole model or in an override"
        )
        return
    yield from _skipped_types(config)
    yield from _type_overrides(config)
    yield from _bit_pairs(config)


def _bit_pairs(config: RetrainConfig) -> Iterator[str]:
    settings = [((), "", config.data, config.weight)] if config.data or config.weight else []
    locations: list[tuple[tuple[str | int, ...], str, DataQuant | None, WeightSettings | None]] = [*settings]
    for name, kind in (("override_layer_configs", "layer"), ("override_layer_types", "type")):
        locations += [
            ((name, index), f"{kind} '{item.target}': ", item.data, item.weight)
            for index, item in enumerate(getattr(config, name))
            if item.quantizes
        ]
    for location, label, data, weight in locations:
        bits = (data or DataQuant()).num_bits, (weight or WeightSettings()).num_bits
        if bits not in _BIT_PAIRS:
            pairs = ", ".join(f"INT{act} with INT{wts}" for act, wts in _BIT_PAIRS)
            yield (
                f"{config.locations.at(*location)}: {label}INT{bits[0]} activations with INT{bits[1]} weights do not "
                f"go together; choose one of {pairs}"
            )


def _skipped_layers(config: RetrainConfig, traits: Mapping[str, LayerTraits]) -> Iterator[str]:
    def prunable(trait: LayerTraits) -> bool:
        return _prunable(config, trait)

    def quantizable(trait: LayerTraits) -> bool:
        return trait.quantizable

    layer_rules: tuple[tuple[str, bool, Callable[[LayerTraits], bool], str], ...] = (
        ("skip_layers", True, _any_method, "compressed"),
        ("quant_skip_layers", quant_active(config), quantizable, "quantised"),
        ("regular_prune_skip_layers", prune_active(config), prunable, "pruned"),
    )
    for list_name, binding, suits, what in layer_rules:
        for index, name in enumerate(getattr(config, list_name)):
            location = config.locations.at(list_name, index)
            trait = traits.get(name)
            if trait is None:
                yield f"{location}: {list_name}: {_unknown_layer(name, traits)}"
            elif binding and not suits(trait):
                known = trait.not_quantizable_reason if what == "quantised" else ""
                reason = f" ({known})" if known else ""
                yield f"{location}: {list_name}: layer '{name}' ({trait.type}) is not {what} anyway{reason}; remove it"


def _skipped_types(config: RetrainConfig) -> Iterator[str]:
    methods = _methods(config)
    prune_types = (FILTER_PRUNABLE if methods == {FilterPrune} else SPARSE_PRUNABLE) if methods else ()
    quant_types = _quant_types(config)
    every_type = (*quant_types, *SPARSE_PRUNABLE)
    for list_name, allowed in (
        ("skip_layer_types", every_type),
        ("quant_skip_types", quant_types if quant_active(config) else every_type),
        ("regular_prune_skip_types", prune_types or every_type),
    ):
        for index, name in enumerate(getattr(config, list_name)):
            if name not in allowed:
                yield f"{config.locations.at(list_name, index)}: {list_name}: {_unknown_type(name, allowed)}"


def _layer_overrides(config: RetrainConfig, traits: Mapping[str, LayerTraits]) -> Iterator[str]:
    for index, item in enumerate(config.override_layer_configs):
        location = config.locations.at("override_layer_configs", index, "layer_name")
        label = f"{location}: override_layer_configs: layer '{item.target}'"
        trait = traits.get(item.target)
        if trait is None:
            yield f"{location}: override_layer_configs: {_unknown_layer(item.target, traits)}"
            continue
        _note_empty(item, label)
        if item.quantizes and not trait.quantizable:
            reason = trait.not_quantizable_reason or "not a supported layer"
            yield f"{label} ({trait.type}) cannot be quantised: {reason}"
        if isinstance(item.prune, FilterPrune) and not trait.filter_prunable:
            yield f"{label} ({trait.type}) has no output channels that can be removed; remove its filter_pruner"
        if isinstance(item.prune, SparsePrune) and not trait.sparse_prunable:
            yield f"{label} ({trait.type}) cannot be 2:4 sparse; remove its n_out_of_m_pruner"


def _type_overrides(config: RetrainConfig) -> Iterator[str]:
    for index, item in enumerate(config.override_layer_types):
        location = config.locations.at("override_layer_types", index, "layer_type")
        _note_empty(item, f"{location}: override_layer_types: type '{item.target}'")
        allowed: tuple[str, ...] = _quant_types(config)
        if isinstance(item.prune, FilterPrune):
            allowed = FILTER_PRUNABLE
        elif isinstance(item.prune, SparsePrune):
            allowed = SPARSE_PRUNABLE
        if item.target not in allowed:
            yield f"{location}: override_layer_types: {_unknown_type(item.target, allowed)}"


def _quant_types(config: RetrainConfig) -> tuple[str, ...]:
    return QUANTIZABLE if goes_beyond_amct(config.profile) else QUANTIZABLE_BY_AMCT


def _note_empty(item: Override, label: str) -> None:
    if not item.quantizes and item.prune is None:
        logger.warning("%s: the override sets nothing and has no effect", label)


def _unknown_layer(name: str, traits: Mapping[str, LayerTraits]) -> str:
    inside = [item for item in traits if item.startswith(f"{name}.")]
    if inside:
        return f"'{name}' is a module with layers inside, not a layer; name each of them, e.g. '{inside[0]}'"
    return f"the model has no layer '{name}'{close_matches(name, traits)}"


def _unknown_type(name: str, allowed: tuple[str, ...]) -> str:
    return f"layer type '{name}' is not one of {', '.join(dict.fromkeys(allowed))}{close_matches(name, allowed)}"
