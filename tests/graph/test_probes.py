"""What happens beside the recorded forward: unread results, blocks merged for evaluation, weights read twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checks.onnx_run import run_onnx
from support.jobs.any_job import AnyJob, off
from support.models import small
from support.models.merging import Branches
from support.models.net_of_function import Net
from support.models.small import SPARSE_QUANT, linear
from torch import Tensor, nn

import amct_ext
from amct_ext.graph.trace import trace

# -- results that nobody reads


@pytest.mark.parametrize("config", [small.QUANT, small.SPARSE % 0, SPARSE_QUANT, small.FILTER], ids=str)
@pytest.mark.parametrize("unread", [lambda: linear(), lambda: nn.LSTM(8, 8, batch_first=True)], ids=["linear", "lstm"])
def test_an_unread_result(tmp_path: Path, config: str, unread: Any, caplog: pytest.LogCaptureFixture) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.body(x)
        net.pooler(y)
        return net.head(y)

    x = torch.randn(2, 4, 8)
    job = AnyJob(tmp_path, config)
    model = job.calibrated(Net(forward, body=nn.Sequential(linear(), linear()), pooler=unread(), head=linear()), x)
    assert "'pooler' is left as it is" in caplog.text
    report = amct_ext.explain(model)["pooler"]
    assert "reaches no tensor" in report.not_quantised or config == small.FILTER
    seen = model.eval()(x).detach()
    assert off(run_onnx(job.save(model, x)[0], x), seen) < 0.02


def test_what_is_read_in_a_way_that_leaves_no_trace() -> None:
    """A kernel outside of torch's dispatcher: the layers before it are not unread."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.body(x)
        out = torch.zeros_like(y)
        out.numpy()[:] = y.numpy() * 2
        return net.head(out)

    net = Net(forward, body=linear(), head=linear())
    assert not trace(net, torch.randn(2, 8)).excluded


# -- blocks that are merged for evaluation


class Merged(nn.Module):
    def __init__(self, write: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.wide, self.narrow, self.merged = (nn.Conv2d(8, 8, k, padding=k // 2) for k in (3, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.wide(x) + self.narrow(x)
        if self.write:
            weight = self.wide.weight.detach() + F.pad(self.narrow.weight.detach(), (1, 1, 1, 1))
            if self.write == "data":
                self.merged.weight.data = weight
            else:
                with torch.no_grad():
                    self.merged.weight.copy_(weight)
        return self.merged(x)


@pytest.mark.parametrize("write", ["data", "copy", ""])
@pytest.mark.parametrize("config", [small.QUANT, small.FILTER, small.SPARSE % 0], ids=["quant", "filter", "sparse"])
def test_a_block_merged_for_evaluation(
    tmp_path: Path, write: str, config: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Merged(write), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 8, 8)
    model = AnyJob(tmp_path, config).create(net, x)
    assert "'1.merged' is left as it is" in caplog.text
    report = amct_ext.explain(model)
    # Its input may lose channels with the layer before it, as those of the branches that it stands for do.
    assert report["1.merged"].left_alone or report["1.merged"].pruned == "2 input channels removed"
    assert "not in training" in report["1.merged"].not_pruned + report["1.merged"].not_quantised
    model.train()(x).mean().backward()
    model.eval()(x)


class Rewritten(nn.Module):
    """A layer whose weight or bias forward changes, in training and evaluation."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.conv, self.change = nn.Conv2d(8, 8, 3, padding=1), change

    @torch.no_grad()
    def rewrite(self) -> None:
        if self.change == "weight":
            self.conv.weight.clamp_(-0.1, 0.1)
        elif self.change == "bias":
            self.conv.bias.zero_()
        else:
            self.conv.weight = nn.Parameter(self.conv.weight.clamp(-0.1, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        self.rewrite()
        return self.conv(x)


class MergedByTrain(nn.Module):
    """Branches that `train(False)` merges and `train()` takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.merged = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), False

    def train(self, mode: bool = True) -> Any:
        if mode == self.merged:
            delta = F.pad(self.narrow.weight.data, (1, 1, 1, 1))
            self.wide.weight.data += -delta if mode else delta
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) if self.merged else self.wide(x) + self.narrow(x)


REWRITTEN = {
    "weight": (lambda: Rewritten("weight"), "1.conv", "forward writes"),
    "bias": (lambda: Rewritten("bias"), "1.conv", "forward writes"),
    "another parameter": (lambda: Rewritten("exchange"), "1.conv", "forward writes"),
    "merged by train": (MergedByTrain, "1.narrow", "model.eval()"),
}


@pytest.mark.parametrize("kind", REWRITTEN)
@pytest.mark.parametrize("config", [small.QUANT, SPARSE_QUANT], ids=["quant", "sparse_quant"])
def test_weights_that_the_model_changes_itself(
    tmp_path: Path, kind: str, config: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a layer is named at create and left float; what is trained can be saved."""
    torch.manual_seed(0)
    block, name, reason = REWRITTEN[kind]
    net, x = nn.Sequential(nn.Conv2d(3, 8, 1), block(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 8, 8)
    job = AnyJob(tmp_path, config)
    model = job.create(net, x)
    assert f"'{name}' is left as it is: {reason}" in caplog.text
    assert amct_ext.explain(model)["0"].quantised
    model.train()(x).mean().backward()
    seen = model.eval()(x)
    assert off(run_onnx(job.save(model, x)[0], x), seen) < 0.02


def test_layers_skipped_at_random_do_run_in_training() -> None:
    """Stochastic depth: one training forward proves nothing."""

    def forward(net: Any, x: Tensor) -> Tensor:
        skip = net.training and bool(torch.rand(()) < 0.5)
        return net.head(x if skip else net.body(x))

    net, x = Net(forward, body=linear(), head=linear(), unused=linear()), torch.randn(2, 8)
    before = torch.get_rng_state()
    assert not any(trace(net, x).excluded for _ in range(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_in_a_closure_runs_in_training_too() -> None:
    """A layer that does not run makes the probe run; layers in closures are watched in the same copy."""
    net = Net(lambda net, x: net.head(net.closure(x)), body=linear(), head=linear(), unused=linear())
    body = net.body
    net.closure = lambda x: body(x)
    assert not trace(net, torch.randn(2, 8)).excluded


def test_a_model_that_cannot_train_on_the_example_gives_no_verdict() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        if net.training:
            raise ValueError("targets are missing")
        return net.body(x)

    assert not trace(Net(forward, body=linear(), unused=linear()), torch.randn(2, 8)).excluded


# -- weights that are read twice


@pytest.mark.parametrize("config", [small.SPARSE % 0, SPARSE_QUANT, small.QUANT], ids=["sparse", "both", "quant"])
@pytest.mark.parametrize("kind", ["linear", "conv and norm"])
def test_a_weight_that_an_op_reads_too(tmp_path: Path, config: str, kind: str) -> None:
    """The other reader takes the dense, unfolded weight in evaluation and in the files."""
    torch.manual_seed(0)
    if kind == "linear":
        x = torch.randn(16, 8)
        net = Net(lambda m, x: F.linear(m.a(x).relu(), m.a.weight.t()), a=linear(8, 16))
    else:
        x = torch.randn(2, 8, 6, 6)
        net = Net(
            lambda m, x: F.conv_transpose2d(m.norm(m.a(x)).relu(), m.a.weight),
            a=nn.Conv2d(8, 16, 3),
            norm=nn.BatchNorm2d(16),
        ).eval()
        net.norm.weight.data.uniform_(0.5, 2)
    net = nn.Sequential(net, nn.Linear(x.shape[-1], 4))
    job = AnyJob(tmp_path, config)
    model = job.calibrated(net, x)
    seen = model.eval()(x).detach()
    assert off(run_onnx(job.save(model, x)[0], x), seen) < 0.02
    report = amct_ext.explain(model)["0.a"]
    assert not report.pruned
    if config != small.QUANT:
        assert "also read by" in report.not_pruned


class MergedByEval(nn.Sequential):
    """A network whose eval() merges its blocks for good."""

    def eval(self) -> Any:
        for block in self:
            if isinstance(block, Branches) and not hasattr(block, "merged"):
                block.switch_to_deploy()
        return super().eval()


def test_layers_that_eval_removes_are_excluded() -> None:
    net = MergedByEval(nn.Conv2d(3, 8, 1), Branches(), nn.Conv2d(8, 4, 1))
    assert set(trace(net, torch.rand(2, 3, 8, 8)).excluded) == {"1.wide", "1.narrow"}
