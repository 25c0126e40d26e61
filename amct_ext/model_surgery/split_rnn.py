"""Splits recurrent layers with several layers or both directions, which cannot be quantised as one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from amct_ext.common.layer_kinds import kind_of, layer_type
from amct_ext.common.references import replace_modules
from amct_ext.config.plan import quant_skipped
from amct_ext.config.text import Override, RetrainConfig
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.trace import Graph, trace
from amct_ext.graph.traits import not_quantizable_reason, parameter_owners, unusable_reason
from amct_ext.layers.recurrent.rnn_stack import RecurrentStack

logger = logging.getLogger("amct_ext")


def split_recurrent(
    model: nn.Module, graph: Graph, inputs: Inputs, config: RetrainConfig
) -> tuple[nn.Module, Graph, RetrainConfig]:
    """Put a `RecurrentStack` in the place of each LSTM and GRU of several layers or directions that is to be quantised.

    Only with `profile: BEST`: AMCT leaves such layers float. Left whole are layers that the configuration skips, those
    with a projection (proj_size), with weights shared with others, and those whose input is no padded sequence.

    ``graph`` is the trace of this very model. Returns the model (its root may be such a layer), the trace of it as it
    is now, and the configuration, where what was said of a split layer is said of its parts. State changed: the model,
    in place.
    """
    if config.profile != "BEST":
        return model, graph, config
    parts, skipped = {}, set()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.RNNBase) or not _splits(model, graph, name, module):
            continue
        if not _asked_for(config, name, module):
            skipped.add(name)
        else:
            stack = RecurrentStack.of(module)
            parts[name] = [f"{name}.{child}" if name else child for child, _ in stack.named_children()]
            model = replace_modules(model, {module: stack})
            logger.info("layer '%s' is quantised as single layers: %s", name, ", ".join(parts[name]))
    # A layer that stays whole cannot be quantised, which a plan takes as a reason to refuse its name in these lists.
    config = replace(
        config,
        override_layer_configs=_of_parts(config.override_layer_configs, parts),
        skip_layers=tuple(name for name in config.skip_layers if name not in skipped),
        quant_skip_layers=tuple(name for name in config.quant_skip_layers if name not in skipped),
    )
    return model, trace(model, inputs) if parts else graph, config


def _of_parts(overrides: tuple[Override, ...], parts: Mapping[str, list[str]]) -> tuple[Override, ...]:
    """What is said of a split layer, said of each part; the others keep their numbers, which errors look up."""
    first = [replace(item, target=parts.get(item.target, [item.target])[0]) for item in overrides]
    more = [replace(item, target=part) for item in overrides for part in parts.get(item.target, [])[1:]]
    return (*first, *more)


def _splits(model: nn.Module, graph: Graph, name: str, module: nn.RNNBase) -> bool:
    kind = kind_of(module)
    if kind is None or not kind.quantizable or module.proj_size or not not_quantizable_reason(kind, module):
        return False
    owners = parameter_owners(dict(model.named_modules()))
    shared = any(len(owners[id(parameter)]) > 1 for parameter in module.parameters())
    return not shared and not unusable_reason(graph.calls, name, module) and name not in graph.excluded


def _asked_for(config: RetrainConfig, name: str, module: nn.RNNBase) -> bool:
    """Whether the configuration quantises the layer, or any of its parts by name (as a JSON configuration does)."""
    part = f"{name}.l" if name else "l"
    named = [item.target for item in config.override_layer_configs if item.quantizes]
    if any(target == name or target.startswith(part) for target in named):
        return True
    return not quant_skipped(config, name, layer_type(module) or "")
