"""What happens beside the recorded forward: fused paths, results that nobody reads, blocks merged for evaluation,
weights read twice, tensors written in place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import small_models as small
from support.any_job import AnyJob, off, run
from torch import Tensor, nn

import amct_ext
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.trace import trace

SPARSE_QUANT = small.SPARSE % 0 + small.QUANT


class Written(nn.Module):
    """A model whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


def linear(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


# -- fused encoders


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_encoder_layers_run_in_every_evaluation(tmp_path: Path, norm_first: bool, mode: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    net, x = nn.Sequential(layer, linear(16, 4)), torch.randn(8, 5, 16)
    job = AnyJob(tmp_path, SPARSE_QUANT)
    model = job.calibrated(net, x)
    with mode():
        plain = model.eval()(x)
    assert off(plain, model(x).detach()) < 1e-5
    assert off(run(job.save(model, x)[0], x), plain.clone()) < 0.05
    assert layer.activation_relu_or_gelu == 1  # the caller's


def test_decoders_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    data = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    model = AnyJob(tmp_path, small.QUANT).calibrated(net, data).eval()
    with torch.no_grad():
        plain = model(*data)
    assert off(plain, model(*data).detach()) < 1e-5
    report = amct_ext.explain(model)
    assert "without calling" in report["encoder.layers.0.self_attn.out_proj"].not_quantised
    assert report["decoder.layers.0.linear1"].quantised


def test_encoder_with_a_padding_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    net = Written(lambda m, x, pad: m.head(m.encoder(x, src_key_padding_mask=pad)), encoder=encoder, head=linear(16, 4))
    x, pad = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    pad[0, 3:] = pad[1, 4:] = True
    job = AnyJob(tmp_path, small.QUANT)
    with caplog.at_level(logging.INFO, "amct_ext"):
        model = job.calibrated(net, (x, pad))
    assert "enable_nested_tensor" in caplog.text
    with torch.no_grad():
        seen, expected = model.eval()(x, pad), net.eval()(x, pad)
    assert off(seen[~pad], expected[~pad]) < 0.1
    assert encoder.enable_nested_tensor
    assert off(run(job.save(model, (x, pad))[0], x, pad)[~pad], seen[~pad]) < 0.05


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
    model = job.calibrated(Written(forward, body=nn.Sequential(linear(), linear()), pooler=unread(), head=linear()), x)
    assert "'pooler' is left as it is" in caplog.text
    report = amct_ext.explain(model)["pooler"]
    assert "reaches no tensor" in report.not_quantised or config == small.FILTER
    seen = model.eval()(x).detach()
    assert off(run(job.save(model, x)[0], x), seen) < 0.02


def test_what_is_read_in_a_way_that_leaves_no_trace() -> None:
    """A kernel outside of torch's dispatcher: the layers before it are not unread."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.body(x)
        out = torch.zeros_like(y)
        out.numpy()[:] = y.numpy() * 2
        return net.head(out)

    net = Written(forward, body=linear(), head=linear())
    assert not trace(net, torch.randn(2, 8)).left_alone


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
    assert report["1.merged"].left_alone
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
    assert off(run(job.save(model, x)[0], x), seen) < 0.02


def test_layers_skipped_at_random_do_run_in_training() -> None:
    """Stochastic depth: one training forward proves nothing."""

    def forward(net: Any, x: Tensor) -> Tensor:
        skip = net.training and bool(torch.rand(()) < 0.5)
        return net.head(x if skip else net.body(x))

    net, x = Written(forward, body=linear(), head=linear(), unused=linear()), torch.randn(2, 8)
    before = torch.get_rng_state()
    assert not any(trace(net, x).left_alone for _ in range(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_in_a_closure_runs_in_training_too() -> None:
    """An idle layer makes it worth while to look; what a lambda holds is looked at in the same copy."""
    net = Written(lambda net, x: net.head(net.run(x)), body=linear(), head=linear(), unused=linear())
    body = net.body
    net.run = lambda x: body(x)
    assert not trace(net, torch.randn(2, 8)).left_alone


def test_a_model_that_cannot_train_on_the_example_gives_no_verdict() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        if net.training:
            raise ValueError("targets are missing")
        return net.body(x)

    assert not trace(Written(forward, body=linear(), unused=linear()), torch.randn(2, 8)).left_alone


# -- weights that are read twice


@pytest.mark.parametrize("config", [small.SPARSE % 0, SPARSE_QUANT, small.QUANT], ids=["sparse", "both", "quant"])
@pytest.mark.parametrize("kind", ["linear", "conv and norm"])
def test_a_weight_that_an_op_reads_too(tmp_path: Path, config: str, kind: str) -> None:
    """The other reader takes the dense, unfolded weight in evaluation and in the files."""
    torch.manual_seed(0)
    if kind == "linear":
        x = torch.randn(16, 8)
        net = Written(lambda m, x: F.linear(m.a(x).relu(), m.a.weight.t()), a=linear(8, 16))
    else:
        x = torch.randn(2, 8, 6, 6)
        net = Written(
            lambda m, x: F.conv_transpose2d(m.norm(m.a(x)).relu(), m.a.weight),
            a=nn.Conv2d(8, 16, 3),
            norm=nn.BatchNorm2d(16),
        ).eval()
        net.norm.weight.data.uniform_(0.5, 2)
    net = nn.Sequential(net, nn.Linear(x.shape[-1], 4))
    job = AnyJob(tmp_path, config)
    model = job.calibrated(net, x)
    seen = model.eval()(x).detach()
    assert off(run(job.save(model, x)[0], x), seen) < 0.02
    report = amct_ext.explain(model)["0.a"]
    assert not report.pruned
    if config != small.QUANT:
        assert "also read by" in report.not_pruned


# -- tensors written in place

IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "nn.Dropout": nn.Dropout(0.5, inplace=True),
    "dropout": lambda x: F.dropout(x, 0.5, True, inplace=True),
    "relu_": lambda x: x.relu_(),
    "add_": lambda x: x.add_(1.0),
    "a view": lambda x: x[:, :4].zero_(),
    "numpy": lambda x: x.detach().numpy().fill(0.5),
}


@pytest.mark.parametrize("change", list(IN_PLACE))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", ["float", "integer"])
def test_an_input_changed_between_its_readers(
    tmp_path: Path, change: str, mode: Any, training: bool, forward: Any
) -> None:
    """The second reader takes the values that are there when it runs."""

    def run_both(net: Any, x: Tensor) -> Tensor:
        x = x.clone()
        y = net.a(x)
        IN_PLACE[change](x)
        return y + net.b(x)

    x = torch.randn(16, 8)
    drop = IN_PLACE[change]
    if isinstance(drop, nn.Module):
        drop.train(training)
    model = AnyJob(tmp_path, small.QUANT).calibrated(Written(run_both, a=linear(), b=linear()), x).train(training)
    amct_ext.configure(model, forward=forward)
    with mode():
        torch.manual_seed(1)
        seen = model(x)
        torch.manual_seed(1)
        changed = x.clone()
        IN_PLACE[change](changed)
        expected = model.a(x) + model.b(changed)
    torch.testing.assert_close(seen, expected)


def test_a_compiled_model_sees_the_change(tmp_path: Path) -> None:
    def run_both(net: Any, x: Tensor) -> Tensor:
        x = x * 1.0
        y = net.a(x)
        net.drop(x)
        return y + net.b(x)

    x = torch.randn(16, 8)
    net = Written(run_both, a=linear(), b=linear(), drop=nn.Dropout(1.0, inplace=True))
    model = AnyJob(tmp_path, small.QUANT).calibrated(net, x).train()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


class Writes(nn.Module):
    """Preprocessing in place, of a tensor and of one inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Sequential(linear(), linear()), nn.Conv2d(1, 4, 1)

    def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
        x -= 1.0
        more[0].mul_(2.0)
        more.append(x)
        return self.fc(x) + self.conv(more[0][:, None])[:, 0]


@pytest.mark.parametrize("config", [small.QUANT, small.SPARSE % 0, small.FILTER], ids=["quant", "sparse", "filter"])
def test_the_callers_tensors_stay_as_they_are(tmp_path: Path, config: str) -> None:
    data = torch.ones(1, 8, 8), [torch.ones(1, 8, 8)]

    def whole() -> bool:
        return bool((data[0] == 1).all() and (data[1][0] == 1).all()) and len(data[1]) == 1

    job, net = AnyJob(tmp_path, config), Writes()
    model = job.create(net, data)
    assert whole()
    model.train()(*Inputs(data).copied().args)
    model.eval()(*Inputs(data).copied().args)
    torch.save({"model": model.state_dict()}, tmp_path / "state.pth")
    restored = (net, data, job.config, job.record, str(tmp_path / "state.pth"), "model")
    amct_ext.restore_compressed_retrain_model(*restored)
    assert whole()
    amct_ext.explain(net, data, job.config)
    assert whole()
    job.save(model, data)
    assert whole()


def test_arguments_are_copied_as_they_are() -> None:
    leaf = torch.ones(2, requires_grad=True)
    module, text = linear(), "text"
    x, inside, same, again, kept = Inputs((leaf * 2, {"a": [leaf]}, text, leaf, module)).copied().args
    assert x.requires_grad
    assert x.is_leaf
    assert inside["a"][0] is again
    assert again is not leaf
    assert (same, kept) == (text, module)
    (other, lock) = Inputs((leaf, (item for item in ()))).copied().args  # what cannot be copied stays
    assert other is not leaf
    assert list(lock) == []
