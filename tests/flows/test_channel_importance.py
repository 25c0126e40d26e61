"""How a job chooses the measure that ranks channels, with and without a loss, and what the choice leaves alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.channel_search import CLASSES, DATA, Search
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.errors import ConfigError
from amct_ext.record.text import read_record

BATCHES = [(DATA[i : i + 2], CLASSES[i : i + 2]) for i in (0, 2, 4)]
CREATES = [amct_ext.create_prune_retrain_model, amct_ext.create_compressed_retrain_model]


def loss(model: nn.Module) -> Any:
    return (nn.functional.cross_entropy(model(x), y) for x, y in BATCHES)


def config(importance: str = "", profile: str = "AMCT", rest: str = "") -> str:
    field = f"importance: {importance}" if importance else ""
    pruner = f"balanced_l2_norm_filter_prune {{ prune_ratio: 0.5 ascend_optimized: false {field} }}"
    return f"profile: {profile}\nprune_config {{ filter_pruner {{ {pruner} }} }}\n{rest}"


class Job:
    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.record = folder, str(folder / "c.cfg"), str(folder / "r.txt")

    def create(self, text: str, model: nn.Module | None = None, create: Any = CREATES[0], **given: Any) -> nn.Module:
        Path(self.config).write_text(text)
        return create(model or trained(), small.SAMPLE, self.config, self.record, **given)

    def removed(self, text: str, **given: Any) -> list[tuple[int, ...]]:
        """What each group loses."""
        self.create(text, **given)
        return [entry.producers[0].prune_index for entry in read_record(self.record).channel]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def trained() -> nn.Module:
    """A model whose measures disagree: its BatchNorm factors are not all one."""
    model = small.build()
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.1, 2, generator=generator)
    return model


def test_a_profile_takes_the_loss_where_there_is_one(job: Job) -> None:
    balanced, group, taylor = (
        job.removed(config(name), pruning_loss=loss if name == "GATE_TAYLOR" else None)
        for name in ("BALANCED_L2", "GROUP_L2", "GATE_TAYLOR")
    )
    assert balanced != group != taylor != balanced
    assert job.removed(config()) == balanced
    assert job.removed(config(profile="BEST")) == group
    assert job.removed(config(profile="BEST"), pruning_loss=loss) == taylor
    assert job.removed(config("BALANCED_L2", "BEST"), pruning_loss=loss) == balanced
    assert [len(removed) for removed in balanced] == [len(removed) for removed in taylor]


@pytest.mark.parametrize("create", CREATES)
def test_taylor_without_a_loss_says_what_to_give(job: Job, create: Any) -> None:
    with pytest.raises(ConfigError, match="importance: GATE_TAYLOR, which needs a loss; give create pruning_loss="):
        job.create(config("GATE_TAYLOR"), create=create)
    assert not Path(job.record).exists()
    with pytest.raises(TypeError, match="pruning_loss must be callable or None, not list"):
        job.create(config("GATE_TAYLOR"), create=create, pruning_loss=[])
    with pytest.raises(TypeError, match="positional"):
        create(small.build(), small.SAMPLE, job.config, job.record, loss)


def test_a_loss_that_ranks_nothing_is_told(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "amct_ext"):
        job.create(config("GROUP_L2"), pruning_loss=loss)
    assert "pruning_loss has no effect" in caplog.text


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_and_random_state_stay_as_they_are(job: Job, training: bool) -> None:
    model = trained().train(training)
    model.fc.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def careless(given: nn.Module) -> Any:
        assert not given.training and given is not model
        given.train()
        for x, y in BATCHES:
            yield nn.functional.cross_entropy(given(x + torch.randn_like(x)), y)
            given.fc.weight.data.zero_()

    state = torch.get_rng_state()
    pruned = job.create(config("GATE_TAYLOR"), model, pruning_loss=careless)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is training for module in (*model.modules(), *pruned.modules()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for each in (model, pruned):
        assert all(p.grad is None for p in each.parameters())
        assert [name for name, p in each.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert torch.equal(pruned.bn1.num_batches_tracked, model.bn1.num_batches_tracked)
    assert torch.equal(pruned.fc.bias, model.fc.bias) and bool(pruned.fc.weight.any())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_loss_is_differentiated_whatever_the_caller_does(job: Job, around: Any) -> None:
    expected = job.removed(config("GATE_TAYLOR"), pruning_loss=loss)
    with around():
        assert job.removed(config("GATE_TAYLOR"), pruning_loss=loss) == expected


@pytest.mark.parametrize("measure", ["GROUP_L2", "GATE_TAYLOR"])
def test_restore_takes_the_records_choice_and_no_loss(job: Job, measure: str) -> None:
    model = job.create(config(measure, rest=small.QUANT), create=CREATES[1], pruning_loss=loss)
    model.train()(small.SAMPLE)
    checkpoint = str(job.folder / "c.pth")
    torch.save({"state": model.state_dict()}, checkpoint)
    restored = amct_ext.restore_compressed_retrain_model(
        trained(), small.SAMPLE, job.config, job.record, checkpoint, "state"
    )
    assert torch.equal(restored.eval()(small.SAMPLE), model.eval()(small.SAMPLE))


def test_explain_tries_a_configuration_without_the_loss(job: Job) -> None:
    Path(job.config).write_text(config("GATE_TAYLOR"))
    assert "8 of 16 output channels removed" in str(amct_ext.explain(trained(), small.SAMPLE, job.config))


def test_the_search_finds_ratios_by_gates_and_asks_for_that_choice(tmp_path: Path) -> None:
    search = Search(tmp_path)
    text = "compress_ratio: 1.5 ascend_optimized: false test_iteration: 6"
    ratios = search.run(text, trained(), [DATA, CLASSES], sensitivity="GateTaylorSensitivity")
    assert any(ratios.values()) and "importance: GATE_TAYLOR" in search.out.read_text()
    record = str(tmp_path / "record.txt")
    with pytest.raises(ConfigError, match="needs a loss"):
        amct_ext.create_prune_retrain_model(trained(), small.SAMPLE, str(search.out), record)
    pruned = amct_ext.create_prune_retrain_model(trained(), small.SAMPLE, str(search.out), record, pruning_loss=loss)
    assert pruned.conv1.out_channels == round(16 * (1 - ratios["conv1"]))

    class Scaled(nn.CrossEntropyLoss):
        def forward(self, output: Tensor, label: Tensor) -> Tensor:
            return 7 * super().forward(output, label)

    measure = amct_ext.GateTaylorSensitivity()
    measure.set_loss_func(Scaled())
    assert search.run(text, trained(), [DATA, CLASSES], sensitivity=measure) == ratios
