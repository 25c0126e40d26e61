"""Putting compressed layers into a model, and taking them out again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from amct_ext.common.references import replace_modules
from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import SparsePrune
from amct_ext.errors import ModelError
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import preserved_state
from amct_ext.graph.trace import Graph
from amct_ext.layers.classes import compressed_class, to_float
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.custom.folded_layer import folded_layer
from amct_ext.layers.custom.functional_parent import FunctionalParent, as_functional_parent, unwrap_functional_parent
from amct_ext.layers.derive import take_attributes
from amct_ext.layers.product_call import Product
from amct_ext.layers.recurrent.rnn import CompressedRNN
from amct_ext.model_surgery.batchnorm_links import foldable
from amct_ext.model_surgery.lookup import compressed_layers, planned_layers

logger = logging.getLogger(__name__)
_UNREPLACEABLE = (
    "the forward reaches it in a way that cannot be followed (an array of objects, ...); hold it in an attribute, "
    "list, tuple or dict of the model"
)


def insert_layers(
    model: nn.Module, graph: Graph, plan: Plan, excluded: Mapping[str, str]
) -> tuple[nn.Module, dict[str, str], dict[str, str]]:
    """Replace each layer that the plan quantises or makes 2:4 sparse, wherever the model refers to it.

    ``graph`` is the trace of this very model, ``excluded``: layers to keep float, with the reason.
    Returns the model, the (conv -> BN) pairs linked, and the reasons of all layers that the plan names and that stay
    float. State changed: the model, in place (its root too, where the root is a layer). Errors: ModelError.
    """
    modules = dict(model.named_modules())
    inserted: dict[str, CompressedLayer] = {}
    kept_float = {}
    for layer_plan in planned_layers(plan):
        name = layer_plan.name
        module = modules[name]
        found = graph.products.get(name)
        product = found if isinstance(found, Product) else None
        cls, reason = compressed_class(module, product)
        reason = reason or excluded.get(name, "")
        if cls is None or reason:
            logger.warning("layer '%s' (%s) is left float: %s", name, type(module).__name__, reason)
            kept_float[name] = reason
            continue
        try:
            fixed_min = _fixed_min(graph, layer_plan, module)
            calls = max(len(graph.calls.get(name, [])), 1)
            layer = cls.from_float(module, layer_plan, calls * plan.batch_num, fixed_min, product)
            for quantizer in layer.own_quantizers:
                quantizer.every_call_calibrates = calls > 1
            inserted[name] = layer
        except (AttributeError, TypeError) as error:
            raise ModelError(f"layer '{name}': its class {type(module).__name__} is in the way: {error}") from error
    model = replace_modules(model, {modules[name]: layer for name, layer in inserted.items()})
    model = _insert_functional_parents(model, inserted)
    _share_inputs(graph, plan, inserted)
    return model, _link_batchnorms(model, graph, inserted), kept_float


def unreplaceable(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> dict[str, str]:
    """Layers that the forward reaches in a way that `replace_modules` cannot follow, with the reason to exclude them.

    An array of objects or a global variable, say: there the float layer would go on running. Found by a forward with
    copies in the place of the layers. State changed: none, all is put back.
    """
    layers = {name: model.get_submodule(name) for name in names}
    copies = {}
    for layer in layers.values():
        copies[layer] = object.__new__(type(layer))
        take_attributes(copies[layer], layer)
    ran: set[int] = set()
    handles = [nn.Module.register_forward_pre_hook(layer, lambda module, _: ran.add(id(module))) for layer in copies]
    replace_modules(model, copies)
    try:
        with preserved_state(model), torch.no_grad():
            inputs.copied().call(model)
    except Exception as error:  # the model ran before: something in it tells a copy from the layer
        logger.debug("no forward with copies of the layers: %s", error)
    finally:
        replace_modules(model, {other: layer for layer, other in copies.items()})
        for handle in handles:
            handle.remove()
    return {name: _UNREPLACEABLE for name, layer in layers.items() if id(layer) in ran}


def fold_layers(model: nn.Module) -> nn.Module:
    """Turn every compressed layer back into a float layer, 2:4 masks folded in (in place; returns the model).

    One with a forward of its own comes back inside of a plain layer, whose weight is the one that is multiplied.
    """
    folded: dict[nn.Module, nn.Module] = {}
    for _, layer in list(compressed_layers(model)):
        plain, product = to_float(layer), layer.refs.product
        folded[layer] = plain if product is None or product.parent else folded_layer(plain, product)
    model = replace_modules(model, folded)
    parents = [module for module in model.modules() if isinstance(module, FunctionalParent)]
    return replace_modules(model, {parent: unwrap_functional_parent(parent) for parent in parents})


def _insert_functional_parents(model: nn.Module, inserted: Mapping[str, CompressedLayer]) -> nn.Module:
    """Replace each module that computes the product of an inserted layer by a functional parent."""
    functional: dict[str, list[str]] = {}
    for name, layer in inserted.items():
        if layer.refs.product is not None and layer.refs.product.parent:
            parent = layer.refs.product.parent
            functional.setdefault(parent, []).append(name.removeprefix(f"{parent}."))
    for parent, names in functional.items():
        module = model.get_submodule(parent)
        model = replace_modules(model, {module: as_functional_parent(module, names)})
    return model


def sharing_groups(graph: Graph, plan: Plan) -> list[tuple[str, ...]]:
    """Groups (two and more) of quantised layers that read one tensor with equal settings, in execution order.

    Empty where 2:4 is on anywhere in the flow: there AMCT gives every layer clips of its own, and checkpoints must
    agree.
    """
    if any(isinstance(layer.prune, SparsePrune) for layer in plan.layers.values()):
        return []
    groups = []
    for readers in graph.shared_inputs():
        by_settings: dict[object, list[str]] = {}
        for name in readers:
            layer = plan.layers.get(name)
            if layer is not None and layer.quant is not None:
                by_settings.setdefault(layer.quant, []).append(name)
        groups += [tuple(names) for names in by_settings.values() if len(names) > 1]
    return groups


def _link_batchnorms(model: nn.Module, graph: Graph, inserted: Mapping[str, CompressedLayer]) -> dict[str, str]:
    """Tell quantised convolutions the BatchNorm that alone reads them; returns the (conv -> BN) pairs."""
    # Folding changes weight and bias in the files, where an op may read them too.
    read = {id(model.get_parameter(name)) for name in graph.parameter_readers()}
    pairs = {}
    for conv, norm in graph.conv_bn().items():
        if conv not in inserted or inserted[conv].weight_quant is None:
            continue
        layer = inserted[conv]
        own = layer.refs.product is not None or all(id(p) not in read for p in layer.parameters(recurse=False))
        if own and foldable(model.get_submodule(norm)):
            inserted[conv].set_batch_norm(model.get_submodule(norm))
            pairs[conv] = norm
    return pairs


def _share_inputs(graph: Graph, plan: Plan, inserted: Mapping[str, CompressedLayer]) -> None:
    for group in sharing_groups(graph, plan):
        # A recurrent layer keeps clips of its own: AMCT has no names for shared ones of it.
        names = [name for name in group if name in inserted and not isinstance(inserted[name], CompressedRNN)]
        for name in names[1:]:
            inserted[name].share_act_quant(inserted[names[0]])


def _fixed_min(graph: Graph, layer: LayerPlan, module: nn.Module) -> bool:
    if layer.quant is None:
        return False
    asked = layer.quant.data.fixed_min
    if asked is not None:
        return asked
    # ONNX has the time axis first: a Transpose stands before a batch_first layer, so AMCT sees no ReLU there and learns
    # a lower clip, which its checkpoints hold.
    return graph.fed_by_relu(layer.name) and not getattr(module, "batch_first", False)
