"""Checks that channels were removed correctly.

The pruned network must compute what the unpruned one does when removed channels have no influence.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from amct_ext.common.layer_kinds import LayerFamily, is_depthwise, kind_of
from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import FilterPrune
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.run import tensors_in
from amct_ext.graph.trace import Graph, trace
from amct_ext.prune.channels import apply_channels, plan_channels
from amct_ext.prune.equivalence import run_masked
from amct_ext.prune.walk import discover
from amct_ext.record.text import format_record, parse_record
from amct_ext.record.types import ChannelRecord, Record


def plan_for(
    graph: Graph, model: nn.Module, ratio: float = 0.4, skip: tuple[str, ...] = (), ascend: bool = False
) -> Plan:
    """Prune every layer that can be pruned by the same ratio, but those in `skip`."""
    layers = {
        name: LayerPlan(
            name, trait.type, None, FilterPrune(ratio, ascend) if trait.filter_prunable and name not in skip else None
        )
        for name, trait in graph.traits(model).items()
    }
    return Plan(1, layers, fp16=False, write_shift_bit=False, quant_active=False, prune_active=True)


def randomize_norms(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and weights as after training, so that nothing is the identity by chance."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def masked(model: nn.Module, records: tuple[ChannelRecord, ...]) -> nn.Module:
    """A copy of the unpruned model in which the weights that would read removed channels are zero."""
    model = copy.deepcopy(model)
    modules: dict[str, Any] = dict(model.named_modules())
    with torch.no_grad():
        for record in records:
            for node in record.consumers:
                module, removed_mask = modules.get(node.name), list(node.prune_index)
                kind = None if module is None else kind_of(module)
                if kind is None or is_depthwise(module):
                    continue
                if kind.family is LayerFamily.LINEAR:
                    module.weight[:, removed_mask] = 0
                elif kind.family is LayerFamily.TRANSPOSED_CONV:
                    module.weight[removed_mask] = 0
                elif kind.family is LayerFamily.CONV:
                    inputs = module.in_channels // module.groups
                    outputs = module.out_channels // module.groups
                    for channel in removed_mask:
                        block = channel // inputs
                        module.weight[block * outputs : (block + 1) * outputs, channel % inputs] = 0
    return model


def outputs(model: nn.Module, data: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(tensors_in(model(*data) if isinstance(data, tuple) else model(data)))


def check_pruning(
    model: nn.Module,
    data: Any,
    ratio: float = 0.4,
    skip: tuple[str, ...] = (),
    tolerance: float = 1e-5,
    mixes: bool = False,
) -> tuple[set[str], dict[str, str]]:
    """Prune a copy and check it against the masked whole; returns the pruned layers, and why the others stay.

    `mixes`: norms or functions of weights mix the channels, so that zero weights are not all there is to mask.
    """
    randomize_norms(model)
    graph = trace(model, data)
    plan = plan_for(graph, model, ratio, skip)
    discovery = discover(graph, plan, model)
    records = plan_channels(discovery, plan, model)
    pruned = copy.deepcopy(model)
    kept = apply_channels(pruned, discovery, records, data)
    assert kept == records, "a record was dropped by the comparison: discovery was wrong"
    references = [] if mixes else [outputs(masked(model, kept), data)]
    removed_mask = discovery.removed_mask(kept, model)
    references.append(run_masked(model, parse_inputs(model, data), discovery, removed_mask)[1])
    for reference in references:
        for got, wanted in zip(outputs(pruned, data), reference, strict=True):
            assert got.shape == wanted.shape
            atol = tolerance * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=atol)
    cut = {node.name for record in kept for node in record.producers if node.prune_index}
    replayed = replay(model, kept, data)
    assert {k: v.tolist() for k, v in replayed.state_dict().items()} == {
        k: v.tolist() for k, v in pruned.state_dict().items()
    }
    check_attributes(pruned)
    assert retraces(pruned, data, graph)
    return cut, discovery.unpruned_reasons()


def replay(model: nn.Module, records: tuple[ChannelRecord, ...], data: Any) -> nn.Module:
    """A copy of the unpruned model, pruned by the records as a file holds them."""
    text = format_record(Record(channel=records))
    model = copy.deepcopy(model)
    graph = trace(model, data)
    discovery = discover(graph, plan_for(graph, model, 0.5), model)
    apply_channels(model, discovery, parse_record(text).channel, data, strict=True)
    return model


def refusal(model: nn.Module, data: Any, layer: str) -> str:
    """Why a layer's channels stay; the model is pruned as far as it goes, and runs as before."""
    cut, stays = check_pruning(model, data, mixes=True)
    assert layer not in cut
    return stays.get(layer, "")


def check_attributes(model: nn.Module) -> None:
    """Every layer's attributes tell its parameters' shapes."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        elif isinstance(module, nn.ConvTranspose2d):
            assert tuple(module.weight.shape[:2]) == (module.in_channels, module.out_channels // module.groups)
        elif isinstance(module, nn.Conv2d):
            assert tuple(module.weight.shape[:2]) == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_mean.shape == (module.num_features,)


def retraces(model: nn.Module, data: Any, before: Graph) -> bool:
    """The pruned model calls the same layers in the same order; views may take the place of copies."""
    one, two = [
        [node.name for node in graph.nodes if node.module is not None] for graph in (trace(model, data), before)
    ]
    return one == two
