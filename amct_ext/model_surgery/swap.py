"""Putting compressed layers into a model, and taking them out again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_ext.common.references import replace_modules
from amct_ext.config.plan import LayerPlan, Plan, SparsePrune
from amct_ext.errors import ModelError
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import undisturbed
from amct_ext.graph.trace import Graph
from amct_ext.layers.classes import compressed_class, to_float
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.derive import take_attributes
from amct_ext.layers.rnn import CompressedRNN

logger = logging.getLogger(__name__)
_UNREPLACEABLE = (
    "the forward reaches it in a way that cannot be followed (an array of objects, ...); hold it in an attribute, "
    "list, tuple or dict of the model"
)


def compressed_layers(model: nn.Module) -> Iterator[tuple[str, CompressedLayer]]:
    """Qualified name and module of every compressed layer, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            yield name, module


def every_layer(model: nn.Module) -> list[CompressedLayer]:
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


def placed_layers(model: nn.Module) -> dict[str, tuple[str, CompressedLayer]]:
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


def insert_layers(
    model: nn.Module, graph: Graph, plan: Plan, leave: Mapping[str, str]
) -> tuple[nn.Module, dict[str, str], dict[str, str]]:
    """Replace each layer that the plan quantises or makes 2:4 sparse, wherever the model refers to it.

    ``graph`` is the trace of this very model, ``leave`` holds layers that stay float all the same, with the reason.
    Returns the model, the (conv -> BN) pairs linked, and the reasons of all layers that the plan names and that stay
    float. State changed: the model, in place (its root too, where the root is a layer). Errors: ModelError.
    """
    modules = dict(model.named_modules())
    touched: dict[str, CompressedLayer] = {}
    left = {}
    for layer_plan in planned_layers(plan):
        name = layer_plan.name
        module = modules[name]
        cls, reason = compressed_class(module)
        reason = reason or leave.get(name, "")
        if cls is None or reason:
            logger.warning("layer '%s' (%s) is left float: %s", name, type(module).__name__, reason)
            left[name] = reason
            continue
        try:
            touched[name] = cls.from_float(module, layer_plan, plan.batch_num, _fixed_min(graph, layer_plan, module))
        except (AttributeError, TypeError) as error:
            raise ModelError(f"layer '{name}': its class {type(module).__name__} is in the way: {error}") from error
    model = replace_modules(model, {modules[name]: layer for name, layer in touched.items()})
    _share_inputs(graph, plan, touched)
    # Folding changes weight and bias in the files, where an op may read them too.
    read = {id(model.get_parameter(name)) for name in graph.parameter_readers()}
    pairs = {}
    for conv, norm in graph.conv_bn().items():
        if conv not in touched or touched[conv].weight_quant is None:
            continue
        own = all(id(parameter) not in read for parameter in modules[conv].parameters(recurse=False))
        if own and foldable(modules[norm]):
            touched[conv].set_batch_norm(modules[norm])
            pairs[conv] = norm
    return model, pairs, left


def unreplaceable(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> dict[str, str]:
    """Layers that the forward reaches in a way that `replace_modules` cannot follow, with the reason to leave them.

    An array of objects or a global variable, say: there the float layer would go on running. Found by a forward with
    twins in the place of the layers. State changed: none, all is put back.
    """
    layers = {name: model.get_submodule(name) for name in names}
    twins = {}
    for layer in layers.values():
        twins[layer] = object.__new__(type(layer))
        take_attributes(twins[layer], layer)
    ran: set[int] = set()
    handles = [nn.Module.register_forward_pre_hook(layer, lambda module, _: ran.add(id(module))) for layer in twins]
    replace_modules(model, twins)
    try:
        with undisturbed(model), torch.no_grad():
            inputs.copied().call(model)
    except Exception as error:  # the model ran before: something in it tells a twin from the layer
        logger.debug("no forward with twins of the layers: %s", error)
    finally:
        replace_modules(model, {twin: layer for layer, twin in twins.items()})
        for handle in handles:
            handle.remove()
    return {name: _UNREPLACEABLE for name, layer in layers.items() if id(layer) in ran}


def link_norms(model: nn.Module, pairs: Mapping[str, str]) -> dict[str, str]:
    """Point convolutions to the BatchNorm modules that follow them now; returns the pairs, by present names, that are.

    A BatchNorm may have been exchanged since create: by SyncBatchNorm, which folds like any other, or by something that
    stays behind the convolution as it is (Identity after a fusion by hand, FrozenBatchNorm).
    """
    modules = dict(model.named_modules())
    placed = placed_layers(model)
    present = {}
    for conv, norm in pairs.items():
        if conv in placed:
            name, layer = placed[conv]
            follower = modules.get(norm)
            layer.set_batch_norm(follower if follower is not None and foldable(follower) else None)
            if layer.refs.batch_norm is not None:
                present[name] = norm
    return present


def norms_linked(model: nn.Module, pairs: Mapping[str, str]) -> bool:
    """Whether `link_norms` has nothing to change, in a fraction of its time; False also where a layer has moved."""
    for conv, norm in pairs.items():
        layer, follower = _at(model, conv), _at(model, norm)
        if not isinstance(layer, CompressedLayer) or layer.layer_name != conv:
            return False
        if layer.refs.batch_norm is not (follower if follower is not None and foldable(follower) else None):
            return False
    return True


def _at(model: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def foldable(norm: nn.Module) -> bool:
    """Whether a module is a BatchNorm that normalises by fixed statistics in evaluation."""
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None


def fold_layers(model: nn.Module) -> nn.Module:
    """Turn every compressed layer back into its float layer, 2:4 masks folded in (in place; returns the model)."""
    return replace_modules(model, {layer: to_float(layer) for _, layer in list(compressed_layers(model))})


def sharing_groups(graph: Graph, plan: Plan) -> list[tuple[str, ...]]:
    """Groups (two and more) of quantised layers that read one tensor with equal settings, in execution order.

    None where 2:4 is on anywhere in the flow: there AMCT gives every layer clips of its own, and checkpoints must
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


def _share_inputs(graph: Graph, plan: Plan, touched: Mapping[str, CompressedLayer]) -> None:
    for group in sharing_groups(graph, plan):
        # A recurrent layer keeps clips of its own: the dialect has no names for shared ones of it.
        names = [name for name in group if name in touched and not isinstance(touched[name], CompressedRNN)]
        for name in names[1:]:
            touched[name].share_act_quant(touched[names[0]])


def _fixed_min(graph: Graph, layer: LayerPlan, module: nn.Module) -> bool:
    if layer.quant is None:
        return False
    asked = layer.quant.data.fixed_min
    if asked is not None:
        return asked
    # ONNX has the time axis first: a Transpose stands before a batch_first layer, so AMCT sees no ReLU there and learns
    # a lower clip, which its checkpoints hold.
    return graph.fed_by_relu(layer.name) and not getattr(module, "batch_first", False)
