"""Configuration of a retraining job: protobuf text -> frozen dataclasses."""

from __future__ import annotations

import logging
import math
import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from amct_ext.errors import ConfigError, ConfigParseError
from amct_ext.proto.text import FieldLocations, MessageSyntaxError, parse_message

_MESSAGE = "amct_ext.config.RetrainConfig"
_BITS = {"INT4": 4, "INT8": 8, "INT16": 16}
_NAME_LISTS = (
    "skip_layers",
    "skip_layer_types",
    "quant_skip_layers",
    "quant_skip_types",
    "regular_prune_skip_layers",
    "regular_prune_skip_types",
)
logger = logging.getLogger("amct_ext")


@dataclass(frozen=True)
class DataQuant:
    """How an activation is quantised. Clips None: found by the range search; fixed_min None: decided from the graph.

    range_search: 'AMCT', 'ABSOLUTE_ERROR', 'PERCENTILE' or 'OUTPUT'; None: as AMCT where that keeps the layer working.
    percentile: of PERCENTILE, in %.
    """

    num_bits: int = 8
    clip_max: float | None = None
    clip_min: float | None = None
    fixed_min: bool | None = None
    range_search: str | None = None
    percentile: float = 99.9


@dataclass(frozen=True)
class WeightSettings:
    """What the file says on weights; channel_wise None: the layer type's default, which the plan fills in.

    scale_start: 'RANGE' or 'LEAST_SQUARES'; compensate_rounding: whether INT4 weights are changed at the end of the
    calibration; None: the profile's. scale_gradient: 'AMCT' (also None) or 'LSQ'.
    """

    algo: str = "arq_retrain"
    num_bits: int = 8
    channel_wise: bool | None = None
    scale_start: str | None = None
    scale_gradient: str | None = None
    compensate_rounding: bool | None = None


@dataclass(frozen=True)
class FilterPrune:
    """Remove output channels: `ratio` of them, the least important, rounded for the device if ascend_optimized.

    importance: 'BALANCED_L2', 'GROUP_L2' or 'GATE_TAYLOR'; None: the profile's.
    """

    ratio: float
    ascend_optimized: bool = True
    importance: str | None = None


@dataclass(frozen=True)
class SparsePrune:
    """2:4 sparsity; update_freq 0: the mask is chosen once, n: anew every n training forwards.

    mask_gradient: 'MASKED' or 'SR_STE' with `decay`; permute_channels: reorder before the first mask; None: the
    profile's.
    """

    update_freq: int = 0
    mask_gradient: str | None = None
    decay: float = 2e-4
    permute_channels: bool | None = None


@dataclass(frozen=True)
class Override:
    """Settings for one layer name or one layer type. None: the message is absent, this part is not touched."""

    target: str
    data: DataQuant | None = None
    weight: WeightSettings | None = None
    prune: FilterPrune | SparsePrune | None = None

    @property
    def quantizes(self) -> bool:
        return self.data is not None or self.weight is not None


@dataclass(frozen=True)
class RetrainConfig:
    """A whole configuration file. `locations` finds the lines of its fields, for messages."""

    batch_num: int = 1
    data: DataQuant | None = None
    weight: WeightSettings | None = None
    prune: FilterPrune | SparsePrune | None = None
    skip_layers: tuple[str, ...] = ()
    skip_layer_types: tuple[str, ...] = ()
    quant_skip_layers: tuple[str, ...] = ()
    quant_skip_types: tuple[str, ...] = ()
    regular_prune_skip_layers: tuple[str, ...] = ()
    regular_prune_skip_types: tuple[str, ...] = ()
    override_layer_configs: tuple[Override, ...] = ()
    override_layer_types: tuple[Override, ...] = ()
    fp16: bool = False
    write_shift_bit: bool = False
    profile: str = "AMCT"
    locations: FieldLocations = field(default=FieldLocations("<config>"), compare=False, repr=False)

    @property
    def source(self) -> str:
        """The file's name, as messages give it."""
        return self.locations.source


def parse_config(path: str | os.PathLike[str]) -> RetrainConfig:
    """Read a configuration file and check everything that can be checked without a model.

    Errors: OSError; ConfigParseError (text that is no configuration); ConfigError (values).
    Source: AMCT's AMCTRetrainConfig.
    """
    source = os.fspath(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigParseError(f"{source}: not a configuration text (byte {error.start} is not UTF-8)") from None
    try:
        message = parse_message(_MESSAGE, text, source, repeated_scalars=True)  # as for AMCT
    except MessageSyntaxError as error:
        raise ConfigParseError(*error.args) from None
    return _Reader(FieldLocations(source, text)).config(message)


class _Reader:
    """Messages -> dataclasses; every error starts with file and line of its field."""

    def __init__(self, locations: FieldLocations) -> None:
        self._locations = locations

    def _error(self, path: tuple[str | int, ...], reason: str) -> ConfigError:
        field_name = next((item for item in reversed(path) if isinstance(item, str)), "")
        return ConfigError(f"{self._locations.at(*path)}: {field_name}: {reason}")

    def config(self, message: Any) -> RetrainConfig:
        if message.batch_num < 1:
            raise self._error(
                ("batch_num",), f"{message.batch_num} batches cannot calibrate anything, must be 1 or more"
            )
        lists: dict[str, Any] = {name: self._names(message, name) for name in _NAME_LISTS}
        return RetrainConfig(
            batch_num=message.batch_num,
            **self._settings(message, ()),
            **lists,
            override_layer_configs=self._overrides(message, "override_layer_configs", "layer_name"),
            override_layer_types=self._overrides(message, "override_layer_types", "layer_type"),
            fp16=message.HasField("fakequant_precision_mode"),
            write_shift_bit=message.write_shift_bit,
            profile=_label(message, "profile") or "AMCT",
            locations=self._locations,
        )

    def _names(self, message: Any, name: str) -> tuple[str, ...]:
        names = tuple(getattr(message, name))
        if len(names) != len(set(names)):
            logger.warning("%s: %s names a layer or type more than once", self._locations.source, name)
        return names

    def _overrides(self, message: Any, name: str, key: str) -> tuple[Override, ...]:
        found: dict[str, Override] = {}
        for index, item in enumerate(getattr(message, name)):
            target = getattr(item, key)
            if not target:
                raise self._error((name, index), f"{key} is required")
            if target in found:
                raise self._error((name, index, key), f"'{target}' has two entries in {name}; merge them into one")
            found[target] = Override(target, **self._settings(item, (name, index)))
        return tuple(found.values())

    def _settings(self, message: Any, path: tuple[str | int, ...]) -> dict[str, Any]:
        readers = (
            ("data", "retrain_data_quant_config", self._data),
            ("weight", "retrain_weight_quant_config", self._weight),
            ("prune", "prune_config", self._prune),
        )
        return {
            key: read(getattr(message, name), (*path, name)) if message.HasField(name) else None
            for key, name, read in readers
        }

    def _data(self, message: Any, path: tuple[str | int, ...]) -> DataQuant:
        ulq, path = message.ulq_quantize, (*path, "ulq_quantize")
        bits = self._bits(ulq)
        if bits == 4:
            raise self._error((*path, "dst_type"), "INT4 activations cannot be retrained; INT8 and INT16 can")
        fixed_min = ulq.fixed_min if ulq.HasField("fixed_min") else None
        percentile = shortest_decimal(ulq.percentile)
        problem = percentile_problem(percentile)
        if problem:
            raise self._error((*path, "percentile"), problem)
        data = DataQuant(bits, None, None, fixed_min, _label(ulq, "range_search"), percentile)
        if not ulq.HasField("clip_max_min"):
            return data
        path = (*path, "clip_max_min")
        clips = ulq.clip_max_min
        for name, sign in (("clip_max", 1), ("clip_min", -1)):
            if not clips.HasField(name):
                raise self._error(path, f"{name} is required, clip_max and clip_min go together")
            value = getattr(clips, name)
            if not (math.isfinite(value) and value * sign > 0):
                wanted = "greater" if sign > 0 else "less"
                raise self._error((*path, name), f"{value} must be finite and {wanted} than 0")
        return replace(data, clip_max=clips.clip_max, clip_min=clips.clip_min)

    def _weight(self, message: Any, path: tuple[str | int, ...]) -> WeightSettings:
        algo = message.WhichOneof("weights_retrain_algo")
        if algo is None:
            return WeightSettings()
        chosen = getattr(message, algo)
        bits = self._bits(chosen)
        if bits == 16:
            raise self._error((*path, algo, "dst_type"), "INT16 weights do not exist; INT8 and INT4 do")
        channel_wise = chosen.channel_wise if chosen.HasField("channel_wise") else None
        gradient = _label(chosen, "scale_gradient") if algo == "ulq_retrain" else None
        compensate = chosen.compensate_rounding if chosen.HasField("compensate_rounding") else None
        return WeightSettings(algo, bits, channel_wise, _label(chosen, "scale_start"), gradient, compensate)

    def _prune(self, message: Any, path: tuple[str | int, ...]) -> FilterPrune | SparsePrune:
        strategy = message.WhichOneof("regular_prune_strategy")
        if strategy is None:
            raise self._error(path, "it is empty; give filter_pruner or n_out_of_m_pruner, or remove it")
        chosen, path = getattr(message, strategy), (*path, strategy)
        if strategy == "n_out_of_m_pruner":
            if not chosen.HasField("l1_selective_prune"):
                raise self._error(path, "l1_selective_prune is required")
            pruner, path = chosen.l1_selective_prune, (*path, "l1_selective_prune")
            decay = shortest_decimal(pruner.decay)
            if not 0 <= decay < math.inf:
                raise self._error((*path, "decay"), f"{decay} must be finite and at least 0")
            permute = pruner.permute_channels if pruner.HasField("permute_channels") else None
            return SparsePrune(pruner.update_freq, _label(pruner, "mask_gradient"), decay, permute)
        if not chosen.HasField("balanced_l2_norm_filter_prune"):
            raise self._error(path, "balanced_l2_norm_filter_prune is required")
        pruner, path = chosen.balanced_l2_norm_filter_prune, (*path, "balanced_l2_norm_filter_prune")
        if not pruner.HasField("prune_ratio"):
            raise self._error(path, "prune_ratio is required")
        ratio = shortest_decimal(pruner.prune_ratio)
        if not 0 < ratio < 1:
            raise self._error((*path, "prune_ratio"), f"{ratio} must lie between 0 and 1, both excluded")
        return FilterPrune(ratio, pruner.ascend_optimized, _label(pruner, "importance"))

    @staticmethod
    def _bits(message: Any) -> int:
        return _BITS[_enum_name(message, "dst_type")]


def percentile_problem(value: float) -> str:
    """What is wrong with a percentile of a range search, '' for nothing."""
    return "" if 50 < value <= 100 else f"{value} must lie above 50 and be at most 100 (%)"


def _label(message: Any, name: str) -> str | None:
    """The label of an enum field that is set, else None."""
    return _enum_name(message, name) if message.HasField(name) else None


def _enum_name(message: Any, name: str) -> str:
    return str(message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number[getattr(message, name)].name)


def shortest_decimal(value: float) -> float:
    """The number with the fewest digits that is `value` as float32: the 0.3 a user wrote, not 0.30000001192..."""
    if not math.isfinite(value):
        return value
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return float(f"{value:.9g}")
