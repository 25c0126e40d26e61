"""A forward that gradient checkpointing runs again, or that only looks on, repeats: it moves no state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state
from support.jobs.rnn_job import Job as RnnJob
from support.jobs.rnn_job import every_kind
from support.models import small
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import amct_ext

CONFIGS = {
    "quant": small.QUANT,
    "learned": small.LEARNED,
    "two batches": "batch_num: 2\n" + small.QUANT,
    "sparse": small.SPARSE % 2,
    "sparse, learned, two batches": "batch_num: 2\n" + small.SPARSE % 3 + small.LEARNED,
}


class Net(nn.Module):
    """Two heads share an input; a part of it, or the layers one by one, run under checkpointing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((self.a(x) * self.b(x).sigmoid()).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "off" or not self.training:
            return self.body(x)
        again = lambda part, x: checkpoint(part, x, use_reentrant=self.how == "reentrant")  # noqa: E731
        if self.how == "layers":
            x = again(self.stem, x).relu()
            return again(self.fc, (again(self.a, x) * again(self.b, x).sigmoid()).mean((2, 3)))
        return again(self.body, x)


def trained(job: Job, how: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net(how)
    model = amct_ext.create_compressed_retrain_model(net, small.SAMPLE, str(job.config), str(job.record))
    amct_ext.configure(model, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    for i in range(5):
        x, y = small.batch(i)
        x.requires_grad_()  # reentrant checkpointing wants that
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["non-reentrant", "reentrant", "layers"])
def test_checkpointing_changes_nothing(tmp_path: Path, name: str, how: str) -> None:
    job = Job(tmp_path, CONFIGS[name])
    plain, repeated = trained(job, "off"), trained(job, how)
    assert_same_state(plain, repeated)
    with torch.no_grad():
        assert torch.equal(plain.eval()(small.SAMPLE), repeated.eval()(small.SAMPLE))


@pytest.mark.parametrize("settings", [{"stash": "off"}, {"forward": "integer"}, {"calibration": "histogram"}], ids=str)
def test_under_each_setting(tmp_path: Path, settings: dict[str, Any]) -> None:
    job = Job(tmp_path, CONFIGS["sparse, learned, two batches"])
    assert_same_state(trained(job, "off", **settings), trained(job, "non-reentrant", **settings))


@every_kind
def test_recurrent_layers(tmp_path: Path, kind: str) -> None:
    models = []
    for on in (False, True):
        job = RnnJob(tmp_path, kind)
        model = job.create().train()
        for i in range(3):
            x = torch.randn(job.sample.shape, generator=torch.Generator().manual_seed(i)).requires_grad_()
            out = checkpoint(model, x, use_reentrant=False) if on else model(x)
            out.square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad
        models.append(model)
    assert_same_state(*models)


# -- forwards that only look on


def under_grad(model: nn.Module, x: Tensor) -> None:
    torch.func.grad(lambda x: model(x).sum())(x)


def under_jvp(model: nn.Module, x: Tensor) -> None:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.func.grad(lambda s: torch.func.functional_call(model, s, (x,)).sum())(
        {key: value for key, value in state.items() if value.is_floating_point()}
    )


def traced(model: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, x, check_trace=False)


def symbolically(model: nn.Module, x: Tensor) -> None:
    make_fx(lambda x: model(x))(x)


def on_fake_tensors(model: nn.Module, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))


def exported(model: nn.Module, x: Tensor) -> None:
    torch.export.export(model, (x,), strict=False)


@pytest.mark.parametrize("look", [under_grad, under_jvp, traced, symbolically, on_fake_tensors, exported])
@pytest.mark.parametrize("name", ["quant", "sparse", "sparse, learned, two batches"])
def test_looking_on_moves_no_state(tmp_path: Path, name: str, look: Callable[[nn.Module, Tensor], None]) -> None:
    job = Job(tmp_path, CONFIGS[name])
    model, twin = trained(job, "off"), trained(job, "off")
    look(model.train(), small.SAMPLE)
    assert_same_state(model, twin)
    before = model.state_dict()
    assert all(type(value) in (Tensor, nn.Parameter) for value in before.values())


@pytest.mark.parametrize("look", [under_grad, traced, symbolically, on_fake_tensors, exported])
@pytest.mark.parametrize("name", ["quant", "sparse, learned, two batches"])
@pytest.mark.parametrize("carried", [False, True])
def test_looking_on_at_a_model_that_never_ran(
    tmp_path: Path, name: str, look: Callable[[nn.Module, Tensor], None], carried: bool
) -> None:
    """Its state is as created, or was copied in place."""
    job = Job(tmp_path, CONFIGS[name])
    net = Net("off")
    model = amct_ext.create_compressed_retrain_model(net, small.SAMPLE, str(job.config), str(job.record))
    if carried:
        state = trained(job, "off").state_dict()
        with torch.no_grad():
            for mine, new in zip(model.state_dict().values(), state.values(), strict=True):
                mine.copy_(new)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for mode in (False, True):
        look(model.train(mode), small.SAMPLE)
    assert all(torch.equal(value.nan_to_num(7), before[key].nan_to_num(7)) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["quant", "two batches"])
def test_checkpointing_in_eval_mode(tmp_path: Path, name: str) -> None:
    """Training with frozen BatchNorm; the shift search looks on meanwhile."""
    job, states = Job(tmp_path, CONFIGS[name]), []
    for how in (None, False, True):
        torch.manual_seed(0)
        model = job.create()
        for i in range(4):
            model.train(i < 2)
            for part in model.modules():  # statistics are counted once more when a part runs again
                if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.Dropout)):
                    part.eval()
            x = small.batch(i)[0].requires_grad_()
            (model(x) if how is None else checkpoint(model, x, use_reentrant=how)).square().mean().backward()
        states.append(model)
    for other in states[1:]:
        assert_same_state(states[0], other)
