"""Files of the search for pruning ratios: what to search for, what to leave alone, and the configuration it ends in."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amct_ext.config.text import FilterPrune, Override, RetrainConfig, parse_config, shortest_decimal
from amct_ext.errors import ConfigError, ConfigParseError
from amct_ext.proto import message_class
from amct_ext.proto.text import FieldLocations, MessageSyntaxError, format_message, parse_message

_SEARCH = "amct_ext.config.AutoChannelPruneConfig"
_RETRAIN = "amct_ext.config.RetrainConfig"
_GLOBAL_RATIO = 0.3  # AMCT writes it; no layer of the model falls under it
_OVERRIDES = ("override_layer_configs", "override_layer_types")
_ALLOWED = ("skip_layers", "skip_layer_types", "regular_prune_skip_layers", "regular_prune_skip_types", *_OVERRIDES)


class SearchConfigError(ConfigParseError, RuntimeError):
    """The search configuration is not valid protobuf text (AMCT: RuntimeError)."""


@dataclass(frozen=True)
class SearchConfig:
    """What to search for. `override`: layers to skip, ratios that are given; `override_file`: '' for none."""

    compress_ratio: float
    ascend_optimized: bool
    max_prune_ratio: float
    test_iteration: int
    override: RetrainConfig
    override_file: str

    def given(self, name: str, layer_type: str) -> FilterPrune | None:
        """The ratio that the override file gives to a layer."""
        for items, target in (
            (self.override.override_layer_configs, name),
            (self.override.override_layer_types, layer_type),
        ):
            found: list[Override] = [item for item in items if item.target == target]
            if found and isinstance(found[0].prune, FilterPrune):
                return found[0].prune
        return None


def read_search_config(path: str) -> SearchConfig:
    """AxisUse the search's configuration and its override file (a relative path counts from the working directory).

    Errors: OSError; SearchConfigError (a RuntimeError: text that is no configuration); ConfigError (values, an override
    file that is missing or holds more than skips and ratios).
    """
    message, locations = _parse(path, _SEARCH)

    def wrong(name: str, reason: str) -> ConfigError:
        return ConfigError(f"{locations.at(name)}: {name}: {reason}")

    if not message.HasField("compress_ratio"):
        raise wrong("compress_ratio", "it is required")
    ratio, max_ratio = shortest_decimal(message.compress_ratio), shortest_decimal(message.max_prune_ratio)
    if not (math.isfinite(ratio) and ratio > 1):
        raise wrong("compress_ratio", f"{ratio} must be finite and greater than 1")
    if not 0 < max_ratio <= 1:
        raise wrong("max_prune_ratio", f"{max_ratio} must be greater than 0 and at most 1")
    if message.test_iteration < 1:
        raise wrong("test_iteration", f"{message.test_iteration} must be 1 or more")
    override_file = message.override_prune_cfg
    if override_file and not Path(override_file).is_file():
        raise wrong("override_prune_cfg", f"there is no file '{override_file}'")
    override = _read_override(override_file) if override_file else RetrainConfig(locations=FieldLocations(path))
    return SearchConfig(ratio, message.ascend_optimized, max_ratio, message.test_iteration, override, override_file)


def _read_override(path: str) -> RetrainConfig:
    message, locations = _parse(path, _RETRAIN)
    for field, _ in message.ListFields():
        if field.name not in _ALLOWED:
            raise ConfigError(
                f"{locations.at(field.name)}: {field.name} has no place in an override file; "
                f"allowed: {', '.join(_ALLOWED)}"
            )
    config = parse_config(path)
    for name in _OVERRIDES:
        for index, item in enumerate(getattr(config, name)):
            if item.quantizes or not isinstance(item.prune, FilterPrune):
                raise ConfigError(
                    f"{locations.at(name, index)}: {name}: '{item.target}' must hold a filter_pruner and nothing else"
                )
    return config


def dumps(config: SearchConfig, ratios: Mapping[str, FilterPrune], untouched: Sequence[str]) -> str:
    """The text of the pruning configuration: the override file's content, one ratio per layer, the rest skipped."""
    message = _parse(config.override_file, _RETRAIN)[0] if config.override_file else message_class(_RETRAIN)()
    whole_model = message_class(_RETRAIN)()  # what holds for all stands first in the text
    _fill(whole_model.prune_config, FilterPrune(_GLOBAL_RATIO, config.ascend_optimized))
    for name, prune in ratios.items():
        _fill(message.override_layer_configs.add(layer_name=name).prune_config, prune)
    named = set(message.regular_prune_skip_layers)
    message.regular_prune_skip_layers.extend(name for name in untouched if name not in named)
    return "".join(format_message(part) for part in (whole_model, message))


def _fill(prune_config: Any, prune: FilterPrune) -> None:
    pruner = prune_config.filter_pruner.balanced_l2_norm_filter_prune
    pruner.prune_ratio, pruner.ascend_optimized = prune.ratio, prune.ascend_optimized
    if prune.importance is not None:
        pruner.importance = pruner.Importance.Value(prune.importance)


def _parse(path: str | os.PathLike[str], kind: str) -> tuple[Any, FieldLocations]:
    source = os.fspath(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SearchConfigError(f"{source}: not a configuration text (byte {error.start} is not UTF-8)") from None
    try:
        message = parse_message(kind, text, source, repeated_scalars=True)
    except MessageSyntaxError as error:
        raise SearchConfigError(*error.args) from None
    return message, FieldLocations(source, text)
