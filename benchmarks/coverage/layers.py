"""What a model consists of, found without the pruners: its layers, which of them make its outputs, what it computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.flop_counter import FlopCounterMode

from amct_ext.graph.run import tensors_in

_PRUNABLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip
_PRODUCTS = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1}  # -> operand that is the weight
_MAX_NODES = 24  # nodes between a product and the parameter of its weight: views, a cast, a standardisation


@dataclass(frozen=True)
class Layers:
    """`widths`: output channels of each layer whose channels may go. `outputs`: layers that make the model's outputs,
    which stay whole. `used`: names of parameters that the outputs depend on."""

    widths: dict[str, int]
    outputs: tuple[str, ...]
    used: frozenset[str]

    def asked(self, ratio: float) -> int:
        return sum(int(width * ratio) for width in self.widths.values())


def call(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """All tensors of the result."""
    return list(tensors_in(model(*inputs)))


def find_layers(model: nn.Module, inputs: tuple[Any, ...]) -> Layers:
    """Of a forward in evaluation mode, by its autograd graph."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    results = [tensor for tensor in call(model.eval(), inputs) if tensor.requires_grad]
    roots = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None]
    used = {names[id(found)] for found in _leaves(roots) if id(found) in names}
    last = {names[id(found)] for found in _last_weights(roots) if id(found) in names}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _PRUNABLE)}
    outputs = tuple(name for name in modules if f"{name}.weight" in last)
    widths = {
        name: width(module)
        for name, module in modules.items()
        if _is_used(name, module, used) and name not in outputs and not _depthwise(module)
    }
    return Layers(widths, outputs, frozenset(used))


def _is_used(name: str, module: nn.Module, used: set[str]) -> bool:
    return any(f"{name}.{parameter}" in used for parameter, _ in module.named_parameters())


def width(module: nn.Module) -> int:
    """Output channels."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.out_channels)  # type: ignore[arg-type]


def widths_of(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Output channels of the layers of these names; layers that are gone are left out."""
    modules = dict(model.named_modules())
    return {name: width(modules[name]) for name in names if name in modules}


def _depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) == getattr(module, "in_channels", 0) > 1


def _walk(roots: Iterable[Node]) -> Iterator[Node]:
    """The nodes that the roots depend on, nearest first."""
    seen = set(roots)
    queue = list(seen)
    for node in queue:
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)


def _variable(node: Node) -> Tensor | None:
    found: Tensor | None = getattr(node, "variable", None)
    return found


def _leaves(roots: Iterable[Node]) -> Iterator[Tensor]:
    for node in _walk(roots):
        variable = _variable(node)
        if variable is not None:
            yield variable


def _last_weights(roots: Iterable[Node]) -> Iterator[Tensor]:
    """Weights of the products that no other product with a weight follows."""
    seen = set(roots)
    queue = list(seen)
    for node in queue:
        weights = _weights(node)
        yield from weights
        for after, _ in () if weights else node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                queue.append(after)


def _weights(node: Node) -> list[Tensor]:
    """Parameters of two dimensions or more that the weight of a product is made of."""
    place = _PRODUCTS.get(node.name())
    operand = None if place is None else node.next_functions[place][0]
    if operand is None:
        return []
    near = list(itertools.islice(_walk([operand]), _MAX_NODES))
    variables = [_variable(item) for item in near] if len(near) < _MAX_NODES else []
    return [found for found in variables if found is not None and found.dim() > 1]


def macs(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiplications of one evaluation in convolutions and matrix products, also those without a layer (attention)."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
