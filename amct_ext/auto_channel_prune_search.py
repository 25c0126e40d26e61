"""AMCT's import path of the ratio search: sample jobs import its classes from here. The code is in flows."""

from amct_ext.flows.channel_search import (
    GateTaylorSensitivity,
    GreedySearch,
    SearchChannelBase,
    SensitivityBase,
    TaylorLossSensitivity,
    auto_channel_prune_search,
)

__all__ = [
    "GateTaylorSensitivity",
    "GreedySearch",
    "SearchChannelBase",
    "SensitivityBase",
    "TaylorLossSensitivity",
    "auto_channel_prune_search",
]
