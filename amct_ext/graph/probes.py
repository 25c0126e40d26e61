"""What one recorded forward does not show, found by running a copy of the model again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amct_ext.common.layer_kinds import QUANTIZABLE, keeps_forward
from amct_ext.common.references import copy_model
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import preserved_random_state, preserved_state, tensors_in
from amct_ext.graph.values import Node

Calls = Mapping[str, list[Node]]

# Layers may be skipped at random in training (stochastic depth); one that is skipped so often does not run.
_TRAINING_FORWARDS = 16


@torch.no_grad()
def eval_only_layers(model: nn.Module, inputs: Inputs, calls: Calls, read: Collection[nn.Parameter]) -> frozenset[str]:
    """Layers that ran in the recorded evaluation and do not run in training mode: nothing would ever train them.

    Example: a block with branches in training that are merged into one layer for evaluation. ``read``: parameters that
    ops outside of layers read. Empty where every layer and every trainable parameter took part in the evaluation (what
    trains is what is evaluated, then) and where the model cannot run in training mode on these arguments.
    """
    candidates = {name for name, nodes in calls.items() if nodes[0].op in QUANTIZABLE}
    has_uncalled_layer = any(name not in calls for name, module in model.named_modules() if keeps_forward(module))
    used = {id(parameter) for parameter in read}
    used |= {id(parameter) for name in calls for parameter in model.get_submodule(name).parameters()}
    unused = [p for p in model.parameters() if p.requires_grad and id(p) not in used]
    if not has_uncalled_layer and not unused:
        return frozenset()
    try:
        model_copy = copy_model(model).train()
        with preserved_random_state(model_copy), _removing_called(model_copy, candidates):
            for _ in range(_TRAINING_FORWARDS):
                inputs.copied().call(model_copy)
                if not candidates:
                    break
    except Exception:
        return frozenset()
    return frozenset(candidates)


@torch.no_grad()
def removed_by_eval_call(model: nn.Module, inputs: Inputs, calls: Calls) -> frozenset[str]:
    """Layers that ran in the recorded evaluation and do not run once `model.eval()` was called.

    Recording sets `module.training` only; a custom `train()` may also change the model, by merging branches say. Empty
    where there is none, and where the model cannot run then.
    """
    if all(type(module).train is nn.Module.train and type(module).eval is nn.Module.eval for module in model.modules()):
        return frozenset()
    candidates = {name for name, nodes in calls.items() if nodes[0].op in QUANTIZABLE}
    try:
        model_copy = copy_model(model).eval()
        renamed = candidates - {name for name, _ in model_copy.named_modules(remove_duplicate=False)}
        candidates -= renamed
        with preserved_random_state(model_copy), _removing_called(model_copy, candidates):
            inputs.copied().call(model_copy)
    except Exception:
        return frozenset()
    return frozenset(candidates | renamed)


@torch.no_grad()
def confirmed_unused(model: nn.Module, inputs: Inputs, unread: Collection[str]) -> frozenset[str]:
    """``unread`` (layers from which no recorded op leads to an output), or nothing where outputs depend on them.

    A kernel that torch's dispatcher does not know leaves no trace; so the outputs are compared with those of a forward
    in which these layers return NaN.
    """
    if not unread:
        return frozenset()
    try:
        with preserved_state(model):
            plain = list(tensors_in(inputs.copied().call(model)))
        with preserved_state(model), _returning_nan(model, unread):
            other = list(tensors_in(inputs.copied().call(model)))
    except Exception:
        return frozenset()
    same = len(plain) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in zip(plain, other, strict=True)
    )
    return frozenset(unread) if same else frozenset()


@contextmanager
def _removing_called(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Take the name of every layer that runs out of ``names``."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: names.discard(name))
        for name in tuple(names)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _returning_nan(model: nn.Module, layers: Collection[str]) -> Iterator[None]:
    def return_nan(_: nn.Module, __: Any, output: Any) -> Any:
        return pytree.tree_map_only(
            torch.Tensor, lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t, output
        )

    handles = [model.get_submodule(name).register_forward_hook(return_nan) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
