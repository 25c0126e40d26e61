"""The quantisation flow's own configuration, read: JSON, one entry per layer (json_text.py writes it).

Layout and key order are AMCT's, so the files are exchangeable. Reading turns the file into the same dataclasses as a
text configuration (text.py) with one override per enabled layer; plan.py resolves both by the same rules.
"""

from __future__ import annotations

import json
import logging
import os
import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amct_ext.config.text import DataQuant, Override, RetrainConfig, WeightSettings, percentile_problem
from amct_ext.errors import ConfigError
from amct_ext.proto.text import FieldLocations, close_matches

VERSION = 1
_BITS = {"INT4": 4, "INT8": 8, "INT16": 16}
FP16 = "FORCE_FP16_QUANT"
TOP_KEYS = ("version", "fakequant_precision_mode", "batch_num", "write_shift_bit", "profile")
_LAYER_KEYS = ("retrain_enable", "retrain_data_config", "retrain_weight_config")
_DATA_KEYS = ("algo", "clip_max", "clip_min", "fixed_min", "dst_type", "range_search", "percentile")
_WEIGHT_KEYS = ("algo", "channel_wise", "dst_type", "scale_start", "scale_gradient", "compensate_rounding")
_RANGE_SEARCHES = ("AMCT", "ABSOLUTE_ERROR", "PERCENTILE", "OUTPUT")
_WEIGHT_ALGOS = ("arq_retrain", "ulq_retrain")
_MAX_BATCHES = 2**32 - 1  # as in a text configuration
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2**-23) * 2.0**127  # of normal float32 numbers
logger = logging.getLogger("amct_ext")


@dataclass(frozen=True)
class JsonConfig:
    """A whole file: `settings` holds an override per enabled layer, `disabled` the layers that it switches off."""

    settings: RetrainConfig
    disabled: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The file's name, as messages give it."""
        return self.settings.locations.source


def read_json(path: str | os.PathLike[str]) -> JsonConfig:
    """Read a configuration file and check all that can be checked without a model.

    Errors: OSError; ConfigError (a ValueError: no JSON, duplicate or missing or unknown keys, values); TypeError (a
    value of the wrong type). Source: AMCT's quantisation-aware training configuration, version 1.
    """
    source = os.fspath(path)
    try:
        content = json.loads(Path(path).read_bytes().decode("utf-8"), object_pairs_hook=_Object)
    except RecursionError:
        raise ConfigError(f"{source}: not a JSON configuration: its objects are nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not a JSON configuration (byte {error.start} is not UTF-8)") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}:{error.lineno}:{error.colno}: not a JSON configuration: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{source}: not a JSON configuration: {error}") from None
    if not isinstance(content, _Object):
        raise ConfigError(f"{source}: a JSON object is needed, not {type(content).__name__}")
    content.check_unique(source)
    return _Reader(source).config(content)


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys stand twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.duplicates = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)

    def check_unique(self, where: str) -> None:
        """Raise ConfigError for a duplicate key here or deeper inside."""
        left = [(where, self)]
        while left:
            location, content = left.pop()
            if content.duplicates:
                raise ConfigError(f"{location}: key '{content.duplicates[0]}' stands more than once; keep one of them")
            left += [(f"{location}: '{name}'", value) for name, value in content.items() if isinstance(value, _Object)]


class _Reader:
    def __init__(self, source: str) -> None:
        self._source = source

    def config(self, content: _Object) -> JsonConfig:
        for key in ("version", "batch_num"):
            if key not in content:
                raise ConfigError(f"{self._source}: '{key}' is missing")
        version = self._typed(content, "version", int, "")
        if version != VERSION:
            raise ConfigError(f"{self._source}: version {version} is not known, only {VERSION} is")
        batch_num = self._typed(content, "batch_num", int, "")
        if batch_num < 1:
            raise ConfigError(f"{self._source}: batch_num: {batch_num} batches cannot calibrate anything, must be >= 1")
        if batch_num > _MAX_BATCHES:
            raise ConfigError(f"{self._source}: batch_num: must be at most {_MAX_BATCHES}")
        mode = self._typed(content, "fakequant_precision_mode", str, "", "DEFAULT")
        self._one_of(mode, ("DEFAULT", FP16), "fakequant_precision_mode")
        profile = self._typed(content, "profile", str, "", "AMCT")
        self._one_of(profile, ("AMCT", "BEST"), "profile")
        enabled, disabled = [], []
        for name, layer in content.items():
            if name in TOP_KEYS:
                continue
            override = self._layer(name, layer)
            if override is None:
                disabled.append(name)
            else:
                enabled.append(override)
        settings = RetrainConfig(
            batch_num=batch_num,
            override_layer_configs=tuple(enabled),
            fp16=mode == FP16,
            write_shift_bit=self._typed(content, "write_shift_bit", bool, "", False),
            profile=profile,
            locations=FieldLocations(self._source),
        )
        return JsonConfig(settings, tuple(disabled))

    def _layer(self, name: str, content: Any) -> Override | None:
        """The settings of a layer, None where it is disabled (its settings are checked all the same)."""
        if not isinstance(content, _Object):
            raise ConfigError(f"{self._source}: layer '{name}' must be a JSON object, not {type(content).__name__}")
        pruning = [key for key in content if "prune" in key]
        if pruning:
            raise ConfigError(f"{self._source}: layer '{name}': '{pruning[0]}': this file only quantises; remove it")
        unknown = [key for key in content if key not in _LAYER_KEYS]
        if unknown:
            logger.warning(
                "%s: layer '%s': %s has no meaning here and is ignored", self._source, name, ", ".join(unknown)
            )
        where = f"layer '{name}': "
        data = self._data(self._typed(content, "retrain_data_config", _Object, where, _Object([])), where)
        weight = self._weight(self._typed(content, "retrain_weight_config", _Object, where, _Object([])), where)
        return Override(name, data, weight) if self._typed(content, "retrain_enable", bool, where, True) else None

    def _data(self, content: _Object, where: str) -> DataQuant:
        where += "retrain_data_config."
        self._known(content, _DATA_KEYS, where)
        self._one_of(self._typed(content, "algo", str, where, "ulq_quantize"), ("ulq_quantize",), f"{where}algo")
        bits = self._bits(content, where, "activations", ("INT8", "INT16"))
        clips: list[float | None] = []
        for key, sign in (("clip_max", 1), ("clip_min", -1)):
            clip = self._typed(content, key, float, where, None)
            if clip is not None and not _SMALLEST <= clip * sign <= _LARGEST:
                wanted = "greater" if sign > 0 else "less"
                raise ConfigError(
                    f"{self._source}: {where}{key}: {clip} must be finite (in float32) and {wanted} than 0"
                )
            clips.append(clip)
        if (clips[0] is None) != (clips[1] is None):
            raise ConfigError(f"{self._source}: {where}clip_max and clip_min go together, one of them is missing")
        percentile = self._typed(content, "percentile", float, where, DataQuant.percentile)
        problem = percentile_problem(percentile)
        if problem:
            raise ConfigError(f"{self._source}: {where}percentile: {problem}")
        fixed_min = self._typed(content, "fixed_min", bool, where, None)
        search = self._choice(content, "range_search", _RANGE_SEARCHES, where)
        return DataQuant(bits, clips[0], clips[1], fixed_min, search, percentile)

    def _weight(self, content: _Object, where: str) -> WeightSettings:
        where += "retrain_weight_config."
        self._known(content, _WEIGHT_KEYS, where)
        algo = self._typed(content, "algo", str, where, "arq_retrain")
        self._one_of(algo, _WEIGHT_ALGOS, f"{where}algo")
        bits = self._bits(content, where, "weights", ("INT8", "INT4"))
        channel_wise = self._typed(content, "channel_wise", bool, where, None)
        start = self._choice(content, "scale_start", ("RANGE", "LEAST_SQUARES"), where)
        gradient = self._choice(content, "scale_gradient", ("AMCT", "LSQ"), where)
        compensate = self._typed(content, "compensate_rounding", bool, where, None)
        return WeightSettings(algo, bits, channel_wise, start, gradient, compensate)

    def _bits(self, content: _Object, where: str, what: str, allowed: tuple[str, ...]) -> int:
        kind = self._typed(content, "dst_type", str, where, "INT8")
        if kind not in allowed:
            raise ConfigError(
                f"{self._source}: {where}dst_type: {kind} {what} cannot be retrained, {' and '.join(allowed)} can"
            )
        return _BITS[kind]

    def _known(self, content: _Object, keys: tuple[str, ...], where: str) -> None:
        for key in content:
            if key not in keys:
                hint = close_matches(key, keys) or f"; known here: {', '.join(keys)}"
                raise ConfigError(f"{self._source}: {where}{key}: unknown key{hint}")

    def _choice(self, content: _Object, key: str, allowed: tuple[str, ...], where: str) -> str | None:
        if key not in content:
            return None
        value: str = self._typed(content, key, str, where)
        self._one_of(value, allowed, f"{where}{key}")
        return value

    def _one_of(self, value: str, allowed: tuple[str, ...], where: str) -> None:
        if value not in allowed:
            raise ConfigError(f"{self._source}: {where}: '{value}' is not one of {', '.join(allowed)}")

    def _typed(self, content: _Object, key: str, kind: type, where: str, default: Any = None) -> Any:
        """The value of a key, of exactly this type (true is no number, 1 is no float), or the default."""
        value = content.get(key, default)
        if key in content and type(value) is not kind:
            wanted = "a JSON object" if kind is _Object else f"of type {kind.__name__}"
            raise TypeError(
                f"{self._source}: {where}{key}: must be {wanted}, not {type(value).__name__} ({reprlib.repr(value)})"
            )
        return value
