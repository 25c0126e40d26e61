"""Cost of a model with channels gone, and the built-in methods of the ratio search, against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_models as small
from support.wide_model import wide
from torch import Tensor, nn

import amct_ext
from amct_ext.config.plan import resolve
from amct_ext.config.text import FilterPrune, RetrainConfig, parse_config
from amct_ext.graph.trace import trace
from amct_ext.prune.channels import discover
from amct_ext.prune.cost import Cost, layer_work, layer_works
from amct_ext.prune.groups import ChannelGroup, Member
from amct_ext.prune.search_space import SearchGraph, graph_info, read_scores, search_records, write_scores


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
        work = layer_work(module, graph.calls[name])
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
    cost = Cost(layer_works(graph, model), groups)
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
    expected = sum(layer_work(present[name], after.calls[name]).bit_operations() for name in layers)
    assert cost(removed) == expected


def test_taylor_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        model[1].weight.copy_(torch.tensor([[0.5, 2.0]]))
    group = ChannelGroup(2, [Member("0", "MatMul")], [Member("1", "MatMul")])
    records = search_records([group])
    measure = amct_ext.TaylorLossSensitivity()
    measure.setup_initialization(
        (SearchGraph(model, ()), {}), [torch.tensor([[1.0, 3.0]]), torch.tensor([[-100.0]])], 1
    )
    measure.get_sensitivity(records)
    # The loss grows with the output, so the gradient of w[c, i] is out_weight[c] * x[i].
    torch.testing.assert_close(read_scores(records[0], group), torch.tensor([0.5 * (1 + 6), 2.0 * (3 + 3)]))


def test_greedy_equals_its_definition() -> None:
    """Each step is the cheapest of all groups at the present widths, searched naively."""
    model = wide()
    graph = trace(model, small.SAMPLE)
    config = RetrainConfig(prune=FilterPrune(0.5, False))
    found = list(discover(graph, resolve(config, graph.traits(model)), model).prunable)
    works = layer_works(graph, model)
    cost = Cost(works, found)
    records, scores = search_records(found), []
    for record, group in zip(records, found, strict=True):
        scores.append(torch.rand(group.count))
        write_scores(record, scores[-1])
    removed = [0] * len(found)
    while cost.original / cost(removed) < 1.5:
        steps = []
        for index, group in enumerate(found):
            blocks = group.blocks or 1
            further = [*removed]
            further[index] += blocks
            if further[index] < group.count:
                rows = scores[index].reshape(blocks, -1).sort(1).values
                loss = rows[:, removed[index] // blocks].double().sum().item()
                steps.append((loss / (cost(removed) - cost(further)), further))
        removed = min(steps)[1]
    kept = amct_ext.GreedySearch().channel_prune_search(graph_info(works), records, (1.5, False, 1.0))
    for group, values, count in zip(found, scores, removed, strict=True):
        blocks = group.blocks or 1
        for member in group.producers:
            flags = torch.tensor(kept[member.name]).reshape(blocks, -1)
            assert (flags == 0).sum(1).tolist() == [count // blocks] * blocks
            rows = values.reshape(blocks, -1)
            assert rows[flags == 0].numel() == 0 or all(
                row[flag == 0].max() <= row[flag == 1].min() for row, flag in zip(rows, flags, strict=True)
            )
