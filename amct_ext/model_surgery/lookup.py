"""The compressed layers of a model, by the names they have now or had at create."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import SparsePrune
from amct_ext.layers.compressed import CompressedLayer


def compressed_layers(model: nn.Module) -> Iterator[tuple[str, CompressedLayer]]:
    """Qualified name and module of every compressed layer, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            yield name, module


def compressed_modules(model: nn.Module) -> list[CompressedLayer]:
    """All compressed layers in registration order, without names: what hooks of every forward ask for."""
    found: list[CompressedLayer] = []
    seen: set[nn.Module | None] = {None}
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            if isinstance(module, CompressedLayer):
                found.append(module)
            pending += reversed(module._modules.values())  # type: ignore[union-attr]
    return found


def layers_by_created_name(model: nn.Module) -> dict[str, tuple[str, CompressedLayer]]:
    """Name at create -> present name and module of each compressed layer.

    A layer that something was put around has moved; of several copies of one the one that stayed counts.
    """
    found: dict[str, tuple[str, CompressedLayer]] = {}
    for name, layer in compressed_layers(model):
        if name == layer.layer_name or layer.layer_name not in found:
            found[layer.layer_name] = (name, layer)
    return found


def planned_layers(plan: Plan) -> list[LayerPlan]:
    """The layers that a plan quantises or makes 2:4 sparse, those that become compressed layers."""
    layers = plan.layers.values()
    return [layer for layer in layers if layer.quant is not None or isinstance(layer.prune, SparsePrune)]
