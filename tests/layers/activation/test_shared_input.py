"""One input read by several layers: whoever sees it first calibrates, and its quantised form serves all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checks.quantizers import quantizers
from support.jobs.retrain_job import Job, optimizer_of, train
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext import ops


class Heads(nn.Module):
    """Three heads read one tensor; which of them run is up to the caller."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        make = (lambda n: nn.Conv2d(4, n, 1)) if convolution else (lambda n: nn.Linear(6, n))
        self.body = nn.Conv2d(4, 4, 1) if convolution else nn.Linear(6, 6)
        self.heads = nn.ModuleList([make(n) for n in (3, 4, 5)])

    def forward(self, x: Tensor, which: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
        y = 3 * self.body(x)
        return [self.heads[i](y) for i in which]


@pytest.mark.parametrize(
    "config", [small.QUANT, small.LEARNED, "batch_num: 2\n" + small.QUANT], ids=["quant", "learned", "two batches"]
)
@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("forward", ["float", "integer"])
@pytest.mark.parametrize("order", [[(1,)] * 3, [(2, 1)] * 3, [(1,), (2,), (0,)], [(2, 0, 1), (0, 1)]], ids=str)
def test_the_first_to_see_a_tensor_calibrates(
    tmp_path: Path, config: str, convolution: bool, forward: str, order: list[tuple[int, ...]]
) -> None:
    job = Job(tmp_path, config)
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6)
    net = Heads(convolution)
    model, twin = (amct_ext.create_compressed_retrain_model(net, x, str(job.config), str(job.record)) for _ in range(2))
    assert len(quantizers(model)) == 2
    for each in (model, twin):
        amct_ext.configure(each, forward=forward)
    for which in order:
        model.train()(x, which)
        twin.train()(x)
    for ours, theirs in zip(quantizers(model), quantizers(twin), strict=True):
        assert ours.calibrated and torch.equal(ours.clip_max, theirs.clip_max)  # a batch counts once
    for which in order:
        got, want = model.eval()(x, which), net.eval()(x, which)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.parametrize("forward", ["float", "integer"])
def test_a_result_that_a_head_did_not_take_is_not_used_in_the_next_forward(tmp_path: Path, forward: str) -> None:
    """The input of the model is the shared tensor, so that the same object comes again, under other clips."""

    class Direct(Heads):
        def forward(self, x: Tensor, which: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
            return [self.heads[i](x) for i in which]

    job, x = Job(tmp_path, small.QUANT), torch.randn(5, 6)
    model = amct_ext.create_compressed_retrain_model(Direct(False), x, str(job.config), str(job.record))
    amct_ext.configure(model, forward=forward)
    model.train()(x, (1,))
    quantizer = quantizers(model)[0]
    model(x, (1,))
    with torch.no_grad():
        quantizer.clip_max.mul_(0.1)
        quantizer.clip_min.mul_(0.1)
    with torch.no_grad():
        alone, together = model(x, (2,))[0], model(x)[2]
    assert torch.equal(alone, together)


def test_gradients_do_not_get_lost_between_parts_with_and_without(tmp_path: Path) -> None:
    """One head runs without gradients, as a monitor does; the other one's input still gets its gradient."""

    class Monitored(Heads):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.heads[0](x)
            return self.heads[1](x)

    job, x = Job(tmp_path, small.QUANT), torch.randn(5, 6, requires_grad=True)
    model = amct_ext.create_compressed_retrain_model(Monitored(False), x, str(job.config), str(job.record)).train()
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_shared_input_is_quantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Job(tmp_path, small.QUANT).create()
    assert model.down.act_quant is None and model.down.input_quantizer is model.conv1.act_quant
    assert not any(k.startswith("down.act_quant") for k in model.state_dict())
    calls = []
    real = ops.ulq_fake_quantize_
    monkeypatch.setattr(ops, "ulq_fake_quantize_", lambda x, *args: calls.append(x.numel()) or real(x, *args))
    model.train()(small.batch(0)[0])
    assert len([n for n in calls if n]) == 4  # stem, conv1 = down, conv2, fc
    assert model.conv1.act_quant.shared.empty  # nothing outlives the forward


def test_shared_clips_get_the_gradient_of_all_readers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Job(tmp_path, small.QUANT).create()
    train(model, optimizer_of(model), range(1))
    x = torch.randn(2, 8, 6, 6) * 3
    quantizer = model.conv1.act_quant
    model.zero_grad()
    (model.conv1(x).sum() + model.down(x).sum() * 2).backward()
    both = quantizer.clip_max.grad.clone()
    quantizer.clip_max.grad = None
    y = quantizer._quantize(x)[0]
    weights = (model.conv1.compressed_weight(), model.down.compressed_weight())
    one = nn.functional.conv2d(y, weights[0], None, 2, 1).sum()
    (one + nn.functional.conv2d(y, weights[1], model.down.bias, 2).sum() * 2).backward()
    torch.testing.assert_close(both, quantizer.clip_max.grad)


def test_reader_without_the_owner(tmp_path: Path) -> None:
    """A reader whose input is not the one that was quantised last computes its own, with the shared clips."""
    model = Job(tmp_path, small.QUANT).create()
    train(model, optimizer_of(model), range(1))
    x = torch.randn(2, 8, 6, 6)
    alone = model.down(x)
    model.conv1(x)
    assert torch.equal(model.down(x), alone)
