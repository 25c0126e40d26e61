"""What a profile chooses for the settings that a configuration leaves open."""

from __future__ import annotations

from dataclasses import replace

from amct_ext.config.text import DataQuant, FilterPrune, SparsePrune, WeightSettings


def fill_data(data: DataQuant, profile: str) -> DataQuant:
    """The settings of an activation, with the profile's range search where none is asked for."""
    if profile != "BEST" or data.range_search is not None:
        return data
    return replace(data, range_search="OUTPUT")


def fill_weight(weight: WeightSettings, profile: str) -> WeightSettings:
    """The settings of a weight, with the profile's start of scales and compensation where none is set."""
    if profile != "BEST":
        return weight
    return replace(
        weight,
        scale_start=weight.scale_start or "LEAST_SQUARES",
        compensate_rounding=True if weight.compensate_rounding is None else weight.compensate_rounding,
    )


def scale_per_channel(profile: str) -> bool:
    """Whether weights that take one scale for AMCT may have one per output channel, and have where nothing is said."""
    return profile == "BEST"


def goes_beyond_amct(profile: str) -> bool:
    """Whether layers are quantised that AMCT leaves float: ConvTranspose3d, and those that run several times."""
    return profile == "BEST"


def fill_prune(prune: FilterPrune | SparsePrune, profile: str, has_loss: bool) -> FilterPrune | SparsePrune:
    """The settings of pruning, with the profile's importance or mask gradient where none is asked for."""
    if profile != "BEST":
        return prune
    if isinstance(prune, FilterPrune):
        return replace(prune, importance=prune.importance or ("GATE_TAYLOR" if has_loss else "GROUP_L2"))
    return replace(
        prune,
        mask_gradient=prune.mask_gradient or "SR_STE",
        permute_channels=True if prune.permute_channels is None else prune.permute_channels,
    )
