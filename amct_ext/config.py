"""Configuration of a retraining job: protobuf text -> frozen dataclasses. Nothing else in the project sees protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class DataQuant:
    """How an activation is quantised. Clips None: found by the range search; fixed_min None: decided from the graph."""

    num_bits: int = 8
    clip_max: float | None = None
    clip_min: float | None = None
    fixed_min: bool | None = None


@dataclass(frozen=True)
class WeightSettings:
    """What the file says on weights; channel_wise None: the layer type's default, which the plan fills in."""

    algo: str = "arq_retrain"
    num_bits: int = 8
    channel_wise: bool | None = None


@dataclass(frozen=True)
class FilterPrune:
    """Remove output channels: `ratio` of them by balanced L2 norm, rounded for the device if ascend_optimized."""

    ratio: float
    ascend_optimized: bool = True


@dataclass(frozen=True)
class SparsePrune:
    """2:4 sparsity; update_freq 0: the mask is chosen once, n: anew every n training forwards."""

    update_freq: int = 0


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
    """A whole configuration file. `lines` maps a place, e.g. ('skip_layers', 0), to its line, for messages only."""

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
    source: str = field(default="<config>", compare=False)
    lines: Mapping[Path, int] = field(default_factory=dict, compare=False, repr=False)
