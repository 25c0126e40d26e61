"""One plan per layer: the configuration's settings, resolved against the layers of a model."""

from __future__ import annotations

from dataclasses import dataclass

from amct_ext.config import DataQuant, FilterPrune, SparsePrune

__all__ = ["DataQuant", "FilterPrune", "LayerPlan", "LayerTraits", "Plan", "QuantPlan", "SparsePrune", "WeightQuant"]


@dataclass(frozen=True)
class LayerTraits:
    """What a layer of the model can take.

    `type` is the torch class name; int4_weights: its Cin is even and it has one group.
    """

    type: str
    quantizable: bool
    filter_prunable: bool
    sparse_prunable: bool
    int4_weights: bool
    why_not_quantizable: str = ""


@dataclass(frozen=True)
class WeightQuant:
    """How a weight is quantised. algo: 'arq_retrain' (range of the current weight) or 'ulq_retrain' (learned scale)."""

    algo: str = "arq_retrain"
    num_bits: int = 8
    channel_wise: bool = True


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
    fp16: bool
    write_shift_bit: bool
    quant_active: bool
    prune_active: bool
