"""Layers that are not called, and by whose weight a module above them multiplies: found by running the model again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import keeps_forward, kind_of
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import preserved_state
from amct_ext.graph.values import Node
from amct_ext.graph.weight_use import factors, sources
from amct_ext.layers.product_call import Product, ProductCall, ProductMode

Calls = list[ProductCall]


def find_hosted(
    model: nn.Module, inputs: Inputs, nodes: Sequence[Node], left: Iterable[str] = ()
) -> dict[str, Product]:
    """The product of each such layer, with the module above it that computes it; ``left``: modules that are no hosts.

    Those of torch's plain layers by which a forward multiplies once, with their own weight and bias, in training too.
    """
    modules = dict(model.named_modules())
    called = {node.module for node in nodes}
    hosts: dict[str, list[str]] = {}
    for node in nodes:
        constant = [value for value in factors(node) if not value.depends_on_input()]
        found = {source.name for value in constant for source in sources(value) if source.kind == "parameter"}
        for name in [parameter.rpartition(".")[0] for parameter in found if parameter.endswith(".weight")]:
            below = node.scope and name.startswith(f"{node.scope}.") and node.scope not in left
            if below and name not in called and _is_layer(modules[name]) and _can_host(modules[node.scope]):
                hosts.setdefault(node.scope, []).append(name)
    if not hosts:
        return {}
    evaluated, trained = (_run(model, inputs, modules, hosts, training) for training in (False, True))
    products = {}
    for host, names in hosts.items():
        for name in names:
            runs = [evaluated.get(name, []), *([trained[name]] if trained else [])]
            if all(len(calls) == 1 and _fits(calls[0], modules[name]) for calls in runs):
                products[name] = Product(runs[0][0].kind, False, True, (), (), host)
    return products


def _is_layer(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.quantizable and keeps_forward(module) and "weight" in module._parameters


def _can_host(module: nn.Module) -> bool:
    own = "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule)
    return not own and kind_of(module) is None and type(module).__call__ is nn.Module.__call__


def _fits(call: ProductCall, layer: nn.Module) -> bool:
    """Whether a call is what the layer itself would compute, up to strides and padding."""
    kind = kind_of(layer)
    assert kind is not None
    plain = call.weight is layer.weight and call.bias is layer.bias
    dims = kind.batched_dims
    return plain and call.kind == kind.name and not call.columns and (dims is None or call.x.dim() == dims)


def _run(
    model: nn.Module, inputs: Inputs, modules: Mapping[str, nn.Module], hosts: Mapping[str, list[str]], training: bool
) -> dict[str, Calls]:
    """By layer, the products by its weight in one forward; none where the model cannot run in this mode."""
    seen: dict[str, Calls] = {name: [] for names in hosts.values() for name in names}
    try:
        for host, names in hosts.items():
            vars(modules[host])["forward"] = _watched(modules[host], {name: modules[name] for name in names}, seen)
        with preserved_state(model, training), torch.no_grad():
            inputs.copied().call(model)
    except Exception:
        return {}
    finally:
        for host in hosts:
            vars(modules[host]).pop("forward", None)
    return seen


def _watched(host: nn.Module, layers: Mapping[str, nn.Module], seen: Mapping[str, Calls]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        run: Callable[[], Any] = lambda: type(host).forward(host, *args, **kwargs)  # noqa: E731
        for name, layer in layers.items():
            run = _under(layer, seen[name], run)
        return run()

    return forward


def _under(layer: nn.Module, calls: Calls, run: Callable[[], Any]) -> Callable[[], Any]:
    def meet(call: ProductCall) -> Tensor:
        calls.append(call)
        return call.compute(call.x, call.weight)

    def under() -> Any:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        with ProductMode(weight, meet):
            return run()

    return under
