"""What `profile: BEST` fills in: what the configuration leaves open, and nothing else."""

from __future__ import annotations

import pytest

from amct_ext.config.profile import fill_data, fill_prune, fill_weight, scale_per_channel
from amct_ext.config.text import DataQuant, FilterPrune, SparsePrune, WeightSettings


def test_the_amct_profile_changes_nothing() -> None:
    for prune in (FilterPrune(0.5), SparsePrune()):
        assert fill_prune(prune, "AMCT", has_loss=True) is prune
    assert fill_data(data := DataQuant(), "AMCT") is data
    assert fill_weight(weight := WeightSettings(), "AMCT") is weight
    assert not scale_per_channel("AMCT")


def test_best_fills_what_is_open() -> None:
    assert fill_data(DataQuant(), "BEST").range_search == "OUTPUT"
    weight = fill_weight(WeightSettings(), "BEST")
    assert (weight.scale_start, weight.compensate_rounding, weight.scale_gradient) == ("LEAST_SQUARES", True, None)
    sparse = fill_prune(SparsePrune(update_freq=7), "BEST", has_loss=False)
    assert sparse == SparsePrune(update_freq=7, mask_gradient="SR_STE", permute_channels=True)
    assert scale_per_channel("BEST")


@pytest.mark.parametrize(("has_loss", "importance"), [(True, "GATE_TAYLOR"), (False, "GROUP_L2")])
def test_channels_are_ranked_by_the_loss_where_there_is_one(has_loss: bool, importance: str) -> None:
    assert fill_prune(FilterPrune(0.5), "BEST", has_loss) == FilterPrune(0.5, importance=importance)


def test_what_is_set_wins() -> None:
    data = DataQuant(range_search="AMCT")
    weight = WeightSettings(scale_start="RANGE", compensate_rounding=False)
    prune = FilterPrune(0.5, importance="BALANCED_L2")
    sparse = SparsePrune(mask_gradient="MASKED", permute_channels=False)
    assert fill_data(data, "BEST") == data and fill_weight(weight, "BEST") == weight
    assert fill_prune(prune, "BEST", True) == prune and fill_prune(sparse, "BEST", True) == sparse
