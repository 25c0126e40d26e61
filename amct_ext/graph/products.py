"""The product inside of a forward that is not torch's: found by running the model with a mode around such forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from amct_ext.common.layer_kinds import computed_parameter, keeps_forward, kind_named, kind_of, layer_type
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import preserved_state, tensors_in
from amct_ext.layers.custom.custom_forward import product_of
from amct_ext.layers.product_call import Product, ProductCall, TensorLike, product_call

_PLAIN_VALUES = (Tensor, bool, int, float, str, type(None))


def find_products(model: nn.Module, inputs: Inputs) -> dict[str, Product | str]:
    """For each module with a weight and a forward of its own: the product in it, or why it has none to quantise.

    Modules that do not run, and those without any product by their weight that are no layers, are left out. The model
    runs once in eval mode and once in training mode, and is left as it was.
    """
    modules = {name: module for name, module in model.named_modules() if _is_candidate(model, name, module)}
    if not modules:
        return {}
    evaluated, trained = {name: _Seen() for name in modules}, {name: _Seen() for name in modules}
    for seen, training in ((evaluated, False), (trained, True)):
        try:
            with preserved_state(model, training), torch.no_grad(), _Watching(modules, seen):
                inputs.copied().call(model)
        except Exception:  # no run, say a BatchNorm over one value in training: nothing is known of that mode
            seen.update({name: _Seen() for name in modules})
    found: dict[str, Product | str] = {}
    for name, seen_once in evaluated.items():
        if seen_once.forwards and (seen_once.calls or kind_of(modules[name]) is not None):
            found[name] = _product(modules[name], seen_once, trained[name])
    return found


@dataclass
class _Seen:
    """What the forwards of one module did: products by its weight, and arguments of the last forward."""

    forwards: int = 0
    # of each call whether its weight is the parameter itself, and whether it depends on the forward's arguments
    calls: list[tuple[ProductCall, bool, bool]] = field(default_factory=list)

    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


class _Watching:
    """Forwards of modules run inside of a probe while this lasts."""

    def __init__(self, modules: Mapping[str, nn.Module], seen: Mapping[str, _Seen]) -> None:
        self._modules, self._seen = modules, seen

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            vars(module)["forward"] = _watched(module, self._seen[name])

    def __exit__(self, *_: object) -> None:
        for module in self._modules.values():
            vars(module).pop("forward", None)


def _watched(module: nn.Module, seen: _Seen) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.forwards += 1
        seen.arguments = args, kwargs
        weight = module.weight
        assert isinstance(weight, Tensor)
        with _Probe(weight, list(tensors_in((args, kwargs))), seen):
            return type(module).forward(module, *args, **kwargs)

    return forward


class _Probe(TorchFunctionMode):
    """Notes the products by one weight, and whether what they multiply by depends on the forward's arguments."""

    def __init__(self, weight: Tensor, inputs: list[Tensor], seen: _Seen) -> None:
        super().__init__()
        self._weight, self._seen = weight, seen
        self._kept: dict[int, Tensor] = {id(tensor): tensor for tensor in (weight, *inputs)}  # ids stay theirs
        self._derived, self._given = {id(weight)}, {id(tensor) for tensor in inputs}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        call = product_call(func, args, kwargs)
        is_product = call is not None and id(call.weight) in self._derived
        if call is not None and is_product:
            self._seen.calls.append((call, call.weight is self._weight, id(call.weight) in self._given))
        result = func(*args, **(kwargs or {}))
        read = {id(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for tensor in tensors_in(result):
            self._kept[id(tensor)] = tensor
            if read & self._given:
                self._given.add(id(tensor))
            if read & self._derived and not is_product:
                self._derived.add(id(tensor))
        return result


def _is_candidate(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module has a weight of its own, and a forward that may multiply by it."""
    if not name or isinstance(module, (nn.Embedding, torch.jit.ScriptModule)):
        return False
    weight, kind = module._parameters.get("weight"), kind_of(module)
    if weight is None or weight.dim() < 2:
        return False
    if keeps_forward(module) or "forward" in vars(module) or (kind is not None and not kind.quantizable):
        return False
    return not computed_parameter(module)


def _product(module: nn.Module, seen: _Seen, trained: _Seen) -> Product | str:
    """The one product of a forward, or why it cannot be quantised."""
    name = type(module).__name__
    if seen.forwards > 1:
        return f"it is called {seen.forwards} times in one forward"
    if len(seen.calls) != 1:
        return f"the forward of its class {name} multiplies by its weight in {len(seen.calls) or 'no'} places"
    call, weight_is_parameter, depends_on_input = seen.calls[0]
    if depends_on_input:
        return f"the forward of its class {name} computes its weight from the input"
    problem = _not_quantizable_reason(module, call)
    if problem:
        return problem
    if trained.forwards and [other.kind for other, _, _ in trained.calls] != [call.kind] * trained.forwards:
        return f"the forward of its class {name} computes something else in training"
    args, kwargs = seen.arguments
    if not all(isinstance(value, _PLAIN_VALUES) for value in pytree.tree_leaves((args, kwargs))):
        return f"the forward of its class {name} takes more than tensors and numbers"
    likes = pytree.tree_map_only(Tensor, lambda x: TensorLike(tuple(x.shape), x.dtype), (args, kwargs))
    product = Product(call.kind, call.weight_is_in_out, weight_is_parameter, likes[0], tuple(likes[1].items()))
    try:
        product_of(module, product)
    except Exception as error:
        return f"the weight that its class {name} multiplies by cannot be computed by itself: {error}"
    return product


def _not_quantizable_reason(module: nn.Module, call: ProductCall) -> str:
    """What keeps a product from being computed on integers, '' where nothing does."""
    kind, wanted = kind_named(call.kind), layer_type(module)
    assert kind is not None
    name = type(module).__name__
    if wanted is not None and call.kind != wanted:
        return f"the forward of its class {name} computes no {wanted}"
    if wanted is None and call.kind.startswith("ConvTranspose"):
        return f"its class {name} is no {call.kind}"
    if kind.batched_dims is not None and call.x.dim() != kind.batched_dims:
        return f"the input of its product has {call.x.dim()} dimensions; {kind.batched_dims} are needed"
    if kind.name == "Linear" and call.weight.dim() != 2:
        return f"the weight of its product has {call.weight.dim()} dimensions; 2 are needed"
    if call.bias is not None and call.bias.dim() != 1:
        return f"the product of its class {name} adds more than one number per channel"
    dilation = call.argument(5, "dilation", 1)
    if kind.name == "Conv3d" and (dilation if isinstance(dilation, int) else dilation[0]) != 1:
        return f"dilation is {dilation} in depth, only 1 can be quantised"
    return ""
