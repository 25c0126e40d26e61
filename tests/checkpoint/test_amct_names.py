"""AMCT's state-dict names: there and back again gives the same state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs import rnn_job
from support.jobs.retrain_job import Job, optimizer_of, train
from support.models import small
from torch import nn

from amct_ext import to_amct_state_dict
from amct_ext.checkpoint.amct_names import from_amct_state_dict, has_amct_names

# What AMCT has no name for: counters of forwards come back as 0 or finished, and the shift search starts over.
COUNTERS = ("batches_seen", "initialised", ".search_n.")


def assert_returns(model: nn.Module) -> None:
    state = model.state_dict()
    amct = to_amct_state_dict(model)
    assert has_amct_names(amct) and not has_amct_names(state)
    back = from_amct_state_dict(model, amct)
    assert sorted(back) == sorted(state)
    for key, value in state.items():
        if not any(part in key for part in COUNTERS):
            assert torch.equal(back[key].to(value).nan_to_num(7), value.nan_to_num(7)), key


@pytest.mark.parametrize("name", ["quant", "learned", "sparse_quant", "mixed_quant"])
def test_a_trained_model_returns(name: str, tmp_path: Path) -> None:
    model = Job(tmp_path, small.CONFIGS[name]).create()
    train(model, optimizer_of(model), range(2))
    assert_returns(model)
    assert any("bn_module" in key for key in to_amct_state_dict(model))


def test_a_model_that_never_ran_returns(tmp_path: Path) -> None:
    assert_returns(Job(tmp_path, small.CONFIGS["quant"]).create())


@rnn_job.every_kind
def test_recurrent_layers_return(kind: str, tmp_path: Path) -> None:
    assert_returns(rnn_job.Job(tmp_path, kind).create())


def test_a_shared_quantiser_is_listed_under_each_of_its_layers(tmp_path: Path) -> None:
    model = Job(tmp_path, small.CONFIGS["quant"]).create()  # conv1 and down read one tensor
    keys = [key for key in to_amct_state_dict(model) if key.endswith(".acts_clip_max")]
    shared = [key for key in keys if "acts_comp_reuse" in key]
    assert shared == ["down.quant_module.acts_comp_reuse.acts_clip_max"]
    assert "conv1.quant_module.acts_clip_max" in keys


def test_keys_of_neither_are_passed_on_to_the_strict_load(tmp_path: Path) -> None:
    model = Job(tmp_path, small.CONFIGS["quant"]).create()
    state = {**to_amct_state_dict(model), "stranger.weight": torch.zeros(1)}
    assert "stranger.weight" in from_amct_state_dict(model, state)
    with pytest.raises(TypeError, match="stranger"):
        from_amct_state_dict(model, {"stranger": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", ["convolutions", "LSTM"])
def test_keys_of_a_layer_that_amct_does_not_write_are_reported(kind: str, tmp_path: Path) -> None:
    recurrent = kind == "LSTM"
    model = (rnn_job.Job(tmp_path, kind) if recurrent else Job(tmp_path, small.CONFIGS["quant"])).create()
    state = to_amct_state_dict(model)
    layer = next(key for key in state if ".quant_module." in key).partition(".quant_module.")[0]
    for unknown in (f"{layer}.quant_module.acts_typo", f"{layer}.quant_module.replaced_module2.weight"):
        assert unknown in from_amct_state_dict(model, {**state, unknown: torch.ones(7, 7)})


def test_a_mask_for_a_layer_without_one_is_reported(tmp_path: Path) -> None:
    (tmp_path / "sparse").mkdir()
    sparse = Job(tmp_path / "sparse", small.CONFIGS["sparse_quant"]).create()
    train(sparse, optimizer_of(sparse), range(2))
    job = Job(tmp_path, small.CONFIGS["quant"])
    job.create()
    torch.save(to_amct_state_dict(sparse), tmp_path / "sparse.pth")
    with pytest.raises(RuntimeError, match=r"unexpected: conv1\.quant_module\.wts_mask"):
        job.restore(tmp_path / "sparse.pth", None)
