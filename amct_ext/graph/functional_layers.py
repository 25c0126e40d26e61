"""Layers that are never called because a parent uses their weight functionally: `F.linear(x, self.qkv.weight)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import keeps_forward, kind_of
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import preserved_state
from amct_ext.graph.values import Node
from amct_ext.graph.weight_use import leaf_parameters, operands
from amct_ext.layers.product_call import Product, ProductCall, ProductMode

Calls = list[ProductCall]


def find_functional_layers(
    model: nn.Module, inputs: Inputs, nodes: Sequence[Node], excluded: Iterable[str] = ()
) -> dict[str, Product]:
    """The product of each such layer, with the module above it that computes it; the model runs twice more.

    Only torch's own layer classes, whose weight and bias a forward multiplies by once, in training too. ``excluded``:
    modules to skip.
    """
    modules = dict(model.named_modules())
    called = {node.module for node in nodes}
    parents: dict[str, list[str]] = {}
    for node in nodes:
        constant = [value for value in operands(node) if not value.depends_on_input()]
        found = {source.name for value in constant for source in leaf_parameters(value) if source.kind == "parameter"}
        for name in [parameter.rpartition(".")[0] for parameter in found if parameter.endswith(".weight")]:
            below = node.scope and name.startswith(f"{node.scope}.") and node.scope not in excluded
            if below and name not in called and _is_layer(modules[name]) and _can_be_parent(modules[node.scope]):
                parents.setdefault(node.scope, []).append(name)
    if not parents:
        return {}
    evaluated, trained = (_run(model, inputs, modules, parents, training) for training in (False, True))
    products = {}
    for parent, names in parents.items():
        for name in names:
            runs = [evaluated.get(name, []), *([trained[name]] if trained else [])]
            if all(len(calls) == 1 and _fits(calls[0], modules[name]) for calls in runs):
                products[name] = Product(runs[0][0].kind, False, True, (), (), parent)
    return products


def _is_layer(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.quantizable and keeps_forward(module) and "weight" in module._parameters


def _can_be_parent(module: nn.Module) -> bool:
    own = "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule)
    return not own and kind_of(module) is None and type(module).__call__ is nn.Module.__call__


def _fits(call: ProductCall, layer: nn.Module) -> bool:
    """Whether a call is what the layer itself would compute, up to strides and padding."""
    kind = kind_of(layer)
    assert kind is not None
    plain = call.weight is layer.weight and call.bias is layer.bias
    dims = kind.batched_dims
    return plain and call.kind == kind.name and not call.weight_is_in_out and (dims is None or call.x.dim() == dims)


def _run(
    model: nn.Module, inputs: Inputs, modules: Mapping[str, nn.Module], parents: Mapping[str, list[str]], training: bool
) -> dict[str, Calls]:
    """By layer, the products by its weight in one forward; none where the model cannot run in this mode."""
    seen: dict[str, Calls] = {name: [] for names in parents.values() for name in names}
    try:
        for parent, names in parents.items():
            vars(modules[parent])["forward"] = _watched(modules[parent], {name: modules[name] for name in names}, seen)
        with preserved_state(model, training), torch.no_grad():
            inputs.copied().call(model)
    except Exception:
        return {}
    finally:
        for parent in parents:
            vars(modules[parent]).pop("forward", None)
    return seen


def _watched(parent: nn.Module, layers: Mapping[str, nn.Module], seen: Mapping[str, Calls]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        run: Callable[[], Any] = lambda: type(parent).forward(parent, *args, **kwargs)  # noqa: E731
        for name, layer in layers.items():
            run = _under(layer, seen[name], run)
        return run()

    return forward


def _under(layer: nn.Module, calls: Calls, run: Callable[[], Any]) -> Callable[[], Any]:
    def note(call: ProductCall) -> Tensor:
        calls.append(call)
        return call.compute(call.x, call.weight)

    def under() -> Any:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        with ProductMode(weight, note):
            return run()

    return under
