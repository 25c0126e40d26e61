"""Cost of a model with channels gone, and the built-in methods of the ratio search, against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_models as small
import torch
from torch import Tensor, nn

import amct_ext
from amct_ext.config.plan import resolve
from amct_ext.config.text import FilterPrune, RetrainConfig, parse_config
from amct_ext.graph.trace import trace
from amct_ext.prune.channels import discover
from amct_ext.prune.cost import Cost, layer_work


def operations(model: nn.Module, sample: Tensor) -> int:
    graph = trace(model, sample)
    modules = dict(model.named_modules())
    layers = [name for name in graph.calls if isinstance(modules[name], (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    return sum(layer_work(modules[name], graph.calls[name]).bit_operations() for name in layers)


class Wide(nn.Module):
    """Channels enough for multiples of 16, a grouped and a depthwise convolution, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(40, 48, 1)
        self.depthwise, self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.Conv2d(48, 32, 3, groups=4)
        self.up, self.fc = nn.ConvTranspose2d(80, 20, 2, stride=2), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(self.b(torch.relu(self.a(x)))))
        x = torch.cat([x[:, :, 1:-1, 1:-1], self.grouped(x)], 1)
        return self.fc(self.up(x).mean((2, 3)))


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Wide()


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
    cost = Cost(graph, model, groups)
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
    group = amct_ext.SearchGroup(("0",), ("1",), 2, (0, 1))
    scores = amct_ext.TaylorLossSensitivity().get_sensitivity(
        model, [group], [((torch.tensor([[1.0, 3.0]]),), torch.tensor([[-100.0]]))]
    )
    # The loss grows with the output, so the gradient of w[c, i] is out_weight[c] * x[i].
    torch.testing.assert_close(scores[0], torch.tensor([0.5 * (1 + 6), 2.0 * (3 + 3)]))


def test_greedy_equals_its_definition() -> None:
    """Each step is the cheapest of all groups at the present widths, searched naively."""
    model = wide()
    graph = trace(model, small.SAMPLE)
    config = RetrainConfig(prune=FilterPrune(0.5, False))
    found = list(discover(graph, resolve(config, graph.traits(model)), model).prunable)
    cost = Cost(graph, model, found)
    groups, scores = [], []
    for group in found:
        blocks = group.blocks or 1
        counts = tuple(range(0, group.count, blocks))
        names = tuple(member.name for member in group.producers)
        groups.append(amct_ext.SearchGroup(names, (), group.count, counts, blocks))
        scores.append(torch.rand(group.count))
    removed = [0] * len(groups)
    while cost.original / cost(removed) < 1.5:
        steps = []
        for index, group in enumerate(groups):
            further = [*removed]
            further[index] += group.blocks
            if further[index] in group.counts:
                rows = scores[index].reshape(group.blocks, -1).sort(1).values
                loss = rows[:, removed[index] // group.blocks].double().sum().item()
                steps.append((loss / (cost(removed) - cost(further)), further))
        removed = min(steps)[1]
    assert amct_ext.GreedySearch().channel_prune_search(groups, scores, cost, 1.5) == removed
