"""Cost of a model with channels removed, against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small
from support.models.wide_model import wide
from torch import Tensor, nn

import amct_ext
from amct_ext.config.plan import resolve
from amct_ext.config.text import parse_config
from amct_ext.graph.trace import trace
from amct_ext.prune.cost import Cost, layer_cost, layer_costs
from amct_ext.prune.walk import discover


def test_cost_counts_multiplications_on_real_feature_maps() -> None:
    model, x = wide().eval(), torch.randn(2, 3, 8, 8)
    counted = dict.fromkeys(dict(model.named_modules()), 0)

    def count(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if isinstance(module, nn.Linear):
                macs = output.numel() * module.in_features
            elif isinstance(module, nn.ConvTranspose2d):
                macs = args[0].numel() * module.weight[0].numel()
            else:
                macs = output.numel() * module.weight[0].numel()
            counted[name] = macs // len(x)

        return hook

    for name, module in model.named_children():
        module.register_forward_hook(count(name))
    model(x)
    graph = trace(model, x)
    for name, module in model.named_children():
        work = layer_cost(module, graph.calls[name])
        per_output = work.bit_operations() / 32**2 / (2 * counted[name])
        assert per_output == pytest.approx(1, rel=0.1)  # biases in, one addition fewer per output


@pytest.mark.parametrize("build", [small.build, wide])
def test_cost_of_removed_channels_is_that_of_the_pruned_model(tmp_path: Path, build: Any) -> None:
    config = tmp_path / "prune.cfg"
    config.write_text(small.FILTER)
    model = build()
    graph = trace(model, small.SAMPLE)
    plan = resolve(parse_config(config), graph.traits(model))
    groups = list(discover(graph, plan, model).prunable)
    cost = Cost(layer_costs(graph, model), groups)
    assert cost([0] * len(groups)) == cost.original
    pruned = amct_ext.create_prune_retrain_model(model, small.SAMPLE, str(config), str(tmp_path / "record.txt"))
    present = dict(pruned.named_modules())
    removed = []
    for group in groups:
        layer = present[group.producers[0].name]
        now = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        removed.append(group.count - now)
    assert sum(removed) > 0
    after = trace(pruned, small.SAMPLE)
    layers = [name for name in after.calls if isinstance(present[name], (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    expected = sum(layer_cost(present[name], after.calls[name]).bit_operations() for name in layers)
    assert cost(removed) == expected
