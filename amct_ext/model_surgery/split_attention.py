"""Splitting nn.MultiheadAttention into its projections, which are quantised as Linear layers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from amct_ext.common.references import replace_modules
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import preserved_state
from amct_ext.graph.traits import parameter_owners
from amct_ext.layers.attention import SplitAttention

logger = logging.getLogger("amct_ext")
_NAMES = {"in_proj", "q_proj", "k_proj", "v_proj"}


def split_attention(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Put a `SplitAttention` in the place of each MultiheadAttention that can be split; returns the model.

    Those are the ones of torch's own forward that run once, with a weight for each of query, key and value, or on one
    tensor as all three (self-attention): the rows of a packed weight would be products on several inputs otherwise.
    Names of parameters and state dicts stay. State changed: the model, in place.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if not found:
        return model
    calls = _calls(model, inputs, list(found.values()))
    owners = parameter_owners(dict(model.named_modules()))
    split: dict[nn.Module, nn.Module] = {}
    for name, module in found.items():
        if _splits(module, calls[module], owners):
            split[module] = SplitAttention.of(module)
            logger.info("attention '%s' is computed by its projections, which are layers of their own", name)
    return replace_modules(model, split)


def _calls(model: nn.Module, inputs: Inputs, modules: list[nn.MultiheadAttention]) -> dict[nn.Module, list[bool]]:
    """By module, for each call in a forward whether query, key and value are one tensor."""
    calls: dict[nn.Module, list[bool]] = {module: [] for module in modules}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        calls[module].append(given.get("query") is given.get("key") and given.get("key") is given.get("value"))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with preserved_state(model), torch.no_grad():
            inputs.copied().call(model)
    except Exception:  # the trace that comes next says what is wrong
        return {module: [] for module in modules}
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _splits(module: nn.MultiheadAttention, calls: list[bool], owners: dict[int, list[str]]) -> bool:
    if isinstance(module, SplitAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    if "forward" in vars(module) or type(module).__call__ is not nn.MultiheadAttention.__call__:
        return False
    if _NAMES & {*vars(module), *module._modules, *dir(type(module))} or hasattr(module, "parametrizations"):
        return False
    weights = ["in_proj_weight"] if module.in_proj_weight is not None else [f"{x}_proj_weight" for x in "qkv"]
    parameters = [module._parameters.get(name) for name in (*weights, "in_proj_bias")]
    if any(parameter is None for parameter in parameters[:-1]):
        return False
    if any(len(owners[id(parameter)]) > 1 for parameter in parameters if parameter is not None):
        return False
    return len(calls) == 1 and (calls[0] or len(weights) == 3)
