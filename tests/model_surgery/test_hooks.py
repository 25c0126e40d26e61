"""Session and hooks of a compressed model: put on at create, taken off without a trace, run in every forward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, optimizer_of, train
from support.models import small
from torch import nn

from amct_ext.model_surgery.hooks import detach
from amct_ext.model_surgery.session import session_of


def hooks_of(model: nn.Module) -> list[object]:
    every = (
        model._forward_pre_hooks,
        model._forward_hooks,
        model._state_dict_pre_hooks,
        model._load_state_dict_post_hooks,
    )
    return [hook for hooks in every for hook in hooks.values()]


def test_detach_takes_off_our_hooks_alone(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    assert len(hooks_of(model)) == 5
    own = model.register_forward_hook(lambda *_: None)
    detach(model)
    assert [*model._forward_hooks] == [own.id] and len(hooks_of(model)) == 1
    assert not set(vars(model)) - set(vars(small.build()))
    model(small.batch(0)[0])


def test_a_load_makes_the_record_stale(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    train(model, optimizer_of(model), range(1))
    model.eval()(small.batch(0)[0])
    session = session_of(model)
    assert session.recorded_state is not None
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert session.recorded_state is None and session.evaluated_state is None


def test_no_state_dict_is_taken_of_a_model_that_saw_nan(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    train(model, optimizer_of(model), range(1))
    model.state_dict()
    model(torch.full_like(small.batch(0)[0], torch.nan))
    with pytest.raises(RuntimeError, match=r"NaN|Inf"):
        model.state_dict()
