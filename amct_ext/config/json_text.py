"""The quantisation flow's own configuration, written from a text configuration or defaults (json.py reads it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from amct_ext.config.json import FP16, TOP_KEYS, VERSION
from amct_ext.config.plan import QuantPlan, resolve
from amct_ext.config.text import DataQuant, RetrainConfig, WeightSettings
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ConfigError
from amct_ext.proto.text import FieldLocations


def default_config() -> RetrainConfig:
    """The configuration that stands in where the user gives none: every layer INT8, ARQ weights."""
    return RetrainConfig(
        data=DataQuant(), weight=WeightSettings(), locations=FieldLocations("the default configuration")
    )


def check_quant_only(config: RetrainConfig) -> None:
    """Raise ConfigError where a text configuration for the quantisation flow speaks of pruning, overrides included."""
    found: list[tuple[str | int, ...]] = [("prune_config",)] if config.prune is not None else []
    found += [(name,) for name in ("regular_prune_skip_layers", "regular_prune_skip_types") if getattr(config, name)]
    for name in ("override_layer_configs", "override_layer_types"):
        overrides = enumerate(getattr(config, name))
        found += [(name, index, "prune_config") for index, item in overrides if item.prune is not None]
    if found:
        locations = "; ".join(f"{config.locations.at(*path)}: {path[-1]}" for path in found)
        raise ConfigError(
            f"{locations}: this function only quantises; remove the pruning fields, or use "
            "create_compressed_retrain_model for both"
        )


def json_text(config: RetrainConfig, traits: Mapping[str, LayerTraits]) -> str:
    """The JSON text of a text configuration (or of `default_config()`) for a model with these layers.

    Layers that no field speaks of get the default settings; skipped ones are written with retrain_enable false. Errors:
    ConfigError (pruning fields, unknown or unsuitable layers, nothing left to quantise).
    """
    check_quant_only(config)
    config = replace(config, data=config.data or DataQuant(), weight=config.weight or WeightSettings())
    plan = resolve(config, traits)
    skips = ("skip_layers", "skip_layer_types", "quant_skip_layers", "quant_skip_types")
    # A skipped layer is written with the settings that it would have.
    nothing_skipped: dict[str, Any] = dict.fromkeys(skips, ())
    full = resolve(replace(config, **nothing_skipped), traits) if any(getattr(config, key) for key in skips) else plan
    content: dict[str, Any] = {"version": VERSION}
    if plan.fp16:
        content["fakequant_precision_mode"] = FP16
    content["batch_num"] = plan.batch_num
    if plan.write_shift_bit:  # a key of our own, and only where it was asked for
        content["write_shift_bit"] = True
    if config.profile != "AMCT":
        content["profile"] = config.profile
    for name, layer in full.layers.items():
        if layer.quant is not None:
            if name in TOP_KEYS:
                raise ConfigError(
                    f"layer '{name}' is called like a setting of the JSON configuration: rename the layer"
                )
            content[name] = {
                "retrain_enable": plan.layers[name].quant is not None,
                **_layer_content(layer.quant, config.profile),
            }
    return json.dumps(content, indent=4, separators=(",", ":"))


def _layer_content(quant: QuantPlan, profile: str) -> dict[str, Any]:
    data: dict[str, Any] = {"algo": "ulq_quantize"}
    if quant.data.clip_max is not None:
        data.update(clip_max=quant.data.clip_max, clip_min=quant.data.clip_min)
    if quant.data.fixed_min is not None:
        data["fixed_min"] = quant.data.fixed_min
    data["dst_type"] = f"INT{quant.data.num_bits}"
    if quant.data.range_search is not None:  # keys of our own, and only where they were asked for
        data["range_search"] = quant.data.range_search
        if quant.data.range_search == "PERCENTILE":
            data["percentile"] = quant.data.percentile
    weight = {
        "algo": quant.weight.algo,
        "channel_wise": quant.weight.channel_wise,
        "dst_type": f"INT{quant.weight.num_bits}",
    }
    if quant.weight.algo == "ulq_retrain":  # AMCT's order for this one
        weight["channel_wise"] = weight.pop("channel_wise")
    # What the reader's profile would choose otherwise is written, too.
    if quant.weight.least_squares or profile != "AMCT":
        weight["scale_start"] = "LEAST_SQUARES" if quant.weight.least_squares else "RANGE"
    if quant.weight.lsq_gradient or profile != "AMCT":
        weight["scale_gradient"] = "LSQ" if quant.weight.lsq_gradient else "AMCT"
    if quant.weight.compensate or profile != "AMCT":
        weight["compensate_rounding"] = quant.weight.compensate
    return {"retrain_data_config": data, "retrain_weight_config": weight}
