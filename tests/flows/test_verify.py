"""verify_pruning: a pruned network beside the whole one without the removed channels."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import small
from torch import nn

import amct_ext
from amct_ext import verify_pruning
from amct_ext.errors import InputDataError, ModelError, RecordError
from amct_ext.flows.verify import compare_records
from amct_ext.model_surgery.session import session_of


@pytest.fixture
def pruned(tmp_path: Path) -> nn.Module:
    (tmp_path / "prune.cfg").write_text(small.FILTER)
    return amct_ext.create_prune_retrain_model(
        small.build(), small.SAMPLE, str(tmp_path / "prune.cfg"), str(tmp_path / "record.txt")
    )


def test_numbers(pruned: nn.Module) -> None:
    original = small.build()
    comparison = verify_pruning(original, pruned, small.SAMPLE)
    assert comparison.error < 1e-5
    whole = sum(p.numel() for p in original.parameters())
    assert comparison.parameters_left == sum(p.numel() for p in pruned.parameters()) / whole
    producers = [n for r in session_of(pruned).channel_records for n in r.producers if n.prune_index]
    assert comparison.removed == sum(len(node.prune_index) for node in producers) > 0
    assert comparison.channels == sum(node.end - node.begin for node in producers)
    assert str(comparison).startswith(f"{comparison.removed} of {comparison.channels} channels removed, ")


def test_neither_model_is_changed(pruned: nn.Module) -> None:
    original = small.build().train()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (original, pruned)]
    modes = [[m.training for m in each.modules()] for each in (original, pruned)]
    verify_pruning(original, pruned, small.SAMPLE)
    for model, state, mode in zip((original, pruned), before, modes, strict=True):
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == mode


def test_training_since_does_not_matter(pruned: nn.Module) -> None:
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.mul_(1.5)
    assert verify_pruning(small.build(), pruned, small.SAMPLE).error < 1e-5


def test_random_numbers_cannot_be_compared(tmp_path: Path) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(nn.functional.dropout(self.a(x), 0.5, training=True))

    (tmp_path / "prune.cfg").write_text(small.FILTER)
    files = str(tmp_path / "prune.cfg"), str(tmp_path / "record.txt")
    original = Dropping()
    pruned = amct_ext.create_prune_retrain_model(original, small.SAMPLE, *files)
    assert pruned.a.out_channels < 8
    with pytest.raises(ModelError, match="draws random numbers"):
        verify_pruning(original, pruned, small.SAMPLE)


def test_a_wrong_removal_is_seen() -> None:
    """A reader that loses another channel than its producer computes something else."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    from support.checks.planned_channels import planned

    data = torch.randn(3, 4)
    _, (record,) = planned(net, data, ratio=0.5)
    assert compare_records(net, (record,), data)[1].error < 1e-6
    removed = record.producers[0].prune_index
    others = tuple(index for index in range(6) if index not in removed)
    wrong = replace(record, consumers=tuple(replace(node, prune_index=others) for node in record.consumers))
    assert compare_records(net, (wrong,), data)[1].error > 1e-2


def test_a_model_that_is_not_pruned() -> None:
    with pytest.raises(ModelError):
        verify_pruning(small.build(), small.build(), small.SAMPLE)


def test_a_pruned_model_of_other_shapes(pruned: nn.Module) -> None:
    name, layer = next((n, m) for n, m in pruned.named_modules() if isinstance(m, nn.Linear))
    layer.bias = nn.Parameter(torch.zeros(layer.out_features + 1))
    with pytest.raises(ModelError, match=rf"{name}.bias has shape .* by the record it is"):
        verify_pruning(small.build(), pruned, small.SAMPLE)


def test_another_original(pruned: nn.Module) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    other(small.SAMPLE if isinstance(small.SAMPLE, torch.Tensor) else small.SAMPLE[0])
    with pytest.raises(RecordError):
        verify_pruning(other, pruned, small.SAMPLE)


def test_input_that_the_original_rejects(pruned: nn.Module) -> None:
    with pytest.raises(InputDataError):
        verify_pruning(small.build(), pruned, torch.randn(1, 1, 1))


def test_a_copy_of_the_pruned_model_is_as_good(pruned: nn.Module) -> None:
    assert verify_pruning(small.build(), copy.deepcopy(pruned), small.SAMPLE).error < 1e-5


class Keeping(nn.Module):
    """Makes a table once and keeps it, as models do for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
        self.level = nn.Parameter(torch.zeros(1))
        self.tables: dict[int, torch.Tensor] = {}
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) not in self.tables:
            self.tables[len(x)] = self.level.detach().exp() * torch.linspace(1, 2, len(x)).unsqueeze(1)
        if self.last is None:
            self.last = x.mean() + x.std()
        return self.b(self.a(x) * self.tables[len(x)] + self.last)


def test_what_a_forward_keeps_is_made_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Keeping(), torch.randn(5, 4)
    (tmp_path / "prune.cfg").write_text(small.FILTER)
    paths = str(tmp_path / "prune.cfg"), str(tmp_path / "record.txt")
    smaller = amct_ext.create_prune_retrain_model(model, x, *paths)
    assert smaller.a.out_features < 16 and not model.tables and model.last is None
    assert verify_pruning(model, smaller, x).error < 1e-5


def test_rounding_is_told_from_a_difference(tmp_path: Path) -> None:
    """What is left of large numbers: float32 loses four digits, float64 shows that nothing is wrong."""
    torch.manual_seed(0)

    class Fraction(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x) * 1e3
            return y - y.round()

    model = Fraction(nn.Linear(4, 700), nn.ReLU(), nn.Linear(700, 3))
    (tmp_path / "prune.cfg").write_text(small.FILTER)
    paths = str(tmp_path / "prune.cfg"), str(tmp_path / "record.txt")
    x = torch.randn(64, 4)
    smaller = amct_ext.create_prune_retrain_model(model, x, *paths)
    wide = verify_pruning(model, smaller, x).error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amct_ext.flows.verify._DOUBTFUL", torch.inf)
        assert verify_pruning(model, smaller, x).error > 1e-5
    assert wide < 1e-9
