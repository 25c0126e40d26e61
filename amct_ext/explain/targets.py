"""What each family of devices gains from which method, and a check of a job against it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from amct_ext.common.wrapping import unwrap
from amct_ext.config.files import read_config
from amct_ext.config.json import JsonConfig
from amct_ext.config.plan import Plan
from amct_ext.config.text import FilterPrune, RetrainConfig, SparsePrune
from amct_ext.model_surgery.session import session_of

logger = logging.getLogger("amct_ext")


@dataclass(frozen=True)
class Target:
    """A family of devices; each flag says whether models made by that method run faster or smaller there."""

    name: str
    products: tuple[str, ...]
    int8_quantisation: bool
    int4_quantisation: bool
    channel_pruning: bool
    sparsity_2to4: bool


TARGETS = (
    Target("Ascend 950", ("950PR", "950DT"), True, False, True, False),
    Target("Atlas A3", ("Atlas A3 training", "Atlas A3 inference"), True, False, True, True),
    Target("Atlas A2", ("Atlas A2 training", "Atlas A2 inference"), True, False, True, True),
)
_METHODS = {
    "int8_quantisation": "INT8 quantisation",
    "int4_quantisation": "INT4 weights",
    "channel_pruning": "channel pruning",
    "sparsity_2to4": "2:4 sparsity",
}
_MAX_LISTED = 5


def find_target(name: str) -> Target:
    """The family of a name like 'Ascend 950PR', 'Atlas A2 training series' or 'a3'. Errors: ValueError."""
    wanted = _short(name)
    for target in TARGETS:
        if wanted and wanted in {_short(item) for item in (target.name, *target.products)}:
            return target
    known = ", ".join(item for target in TARGETS for item in (target.name, *target.products))
    raise ValueError(f"target '{name}' is not known; known are {known}")


def check_target(
    model_or_config: nn.Module | Plan | RetrainConfig | JsonConfig | str | os.PathLike[str], target: str
) -> list[str]:
    """What of a job the target gains nothing from: one warning per method, logged and returned; often none.

    ``model_or_config``: a compressed model, or a configuration (text or JSON; the path of the file, or as read).
    Errors: ValueError (unknown target, configuration), ModelError (a model that is not compressed), OSError.
    """
    family = find_target(target)
    warnings = []
    for method, label in _METHODS.items():
        where = [] if getattr(family, method) else list(dict.fromkeys(_users(model_or_config, method)))
        if where:
            more = f" and {len(where) - _MAX_LISTED} more" if len(where) > _MAX_LISTED else ""
            warnings.append(
                f"{label} is no gain on {family.name} ({', '.join(family.products)}): "
                f"asked for by {', '.join(where[:_MAX_LISTED])}{more}; the model works, but is not faster for it"
            )
    for warning in warnings:
        logger.warning("%s", warning)
    return warnings


def _short(name: str) -> str:
    """'Atlas A2 Training Series Products' and 'a2-training' are one."""
    return re.sub(r"[^a-z0-9]|atlas|ascend|series|products?", "", name.lower())


def _users(source: object, method: str) -> Iterator[str]:
    """The layers, or the parts of a configuration, that use a method."""
    if isinstance(source, (str, os.PathLike)):
        source = read_config(source)
    if isinstance(source, nn.Module):
        source = session_of(unwrap(source)).plan
    if isinstance(source, JsonConfig):
        source = source.settings
    if isinstance(source, Plan):
        for layer in source.layers.values():
            quant = layer.quant
            if _uses(method, None if quant is None else quant.weight.num_bits, layer.prune):
                yield f"layer '{layer.name}'"
    elif isinstance(source, RetrainConfig):
        quantizes = source.data is not None or source.weight is not None
        if _uses(method, _bits(quantizes, source.weight), source.prune):
            yield "the global settings"
        for label, overrides in (("layer", source.override_layer_configs), ("type", source.override_layer_types)):
            for item in overrides:
                if _uses(method, _bits(item.quantizes, item.weight), item.prune):
                    yield f"the override of {label} '{item.target}'"
    else:
        raise TypeError(f"model_or_config must be a model, a configuration or its path, not {type(source).__name__}")


def _bits(quantizes: bool, weight: object) -> int | None:
    return getattr(weight, "num_bits", 8) if quantizes else None


def _uses(method: str, weight_bits: int | None, prune: FilterPrune | SparsePrune | None) -> bool:
    return {
        "int8_quantisation": weight_bits == 8,
        "int4_quantisation": weight_bits == 4,
        "channel_pruning": isinstance(prune, FilterPrune),
        "sparsity_2to4": isinstance(prune, SparsePrune),
    }[method]
