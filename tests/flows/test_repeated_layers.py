"""Layers that run several times in a forward: float as in AMCT, quantised with `profile: BEST`, each call alike."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from support.checks.onnx_run import run_onnx
from support.jobs.any_job import AnyJob, off
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.errors import ConfigError

BEST = "profile: BEST\n" + small.QUANT
CLIPS = "retrain_data_quant_config { ulq_quantize { range_search: ABSOLUTE_ERROR } }\n"


class Levels(nn.Module):
    """A head over two feature maps, as detectors have it, and a Linear on its way back to its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.turn, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        features = [self.head(level).mean((2, 3)) for level in (y, 3 * y[..., ::2, ::2])]
        tokens = torch.stack(features, 1)  # a matrix in one call, several in the other
        return self.last(self.turn(self.turn(tokens).sum(1)))


def net_and_input() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Levels().eval(), torch.randn(2, 3, 8, 8)


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_amct_leaves_them_float_and_the_reason_says_what_quantises_them(tmp_path: Path) -> None:
    net, x = net_and_input()
    report = amct_ext.explain(AnyJob(tmp_path, small.QUANT).create(net, x))
    for name in ("head", "turn"):
        assert report[name].not_quantised == "it is called 2 times in one forward (profile: BEST quantises it)"
        assert report[name].share is not None and report.coverage.float_weights[name] == report[name].share
    with pytest.raises(ConfigError, match="called 2 times"):
        AnyJob(tmp_path, small.QUANT + 'quant_skip_layers: "head"\n').create(net, x)


@pytest.mark.parametrize("text", [BEST, "batch_num: 2\n" + BEST.replace("arq_retrain", "ulq_retrain")], ids=["1", "2"])
def test_a_whole_job(tmp_path: Path, text: str) -> None:
    (net, x), job = net_and_input(), AnyJob(tmp_path, text)
    model = job.create(net, x)
    assert amct_ext.explain(model).coverage.quantised == 1.0
    train(model, x)
    with torch.no_grad():
        expected = model.eval()(x)
    torch.save(model.state_dict(), tmp_path / "s.pth")
    files = str(tmp_path / "job.cfg"), str(tmp_path / "record.txt"), str(tmp_path / "s.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, x, *files).eval()
    assert torch.equal(restored(x), expected)
    fake_quant, deploy = job.save(restored, x)
    assert off(run_onnx(fake_quant, x), expected) < 0.02
    graph = onnx.load(deploy).graph
    counts = {op: sum(node.op_type == op for node in graph.node) for op in ("AscendQuant", "AscendDequant", "Conv")}
    assert counts == {"AscendQuant": 6, "AscendDequant": 6, "Conv": 3}
    weights = {entry.name: entry for entry in graph.initializer if len(entry.dims) > 1}
    assert set(weights) == {"body.weight", "head.weight", "turn.weight", "last.weight"}
    assert all(entry.data_type == onnx.TensorProto.INT8 for entry in weights.values())


def test_the_range_is_that_of_all_calls(tmp_path: Path) -> None:
    net, x = net_and_input()
    config = "profile: BEST batch_num: 2\n" + CLIPS + "retrain_weight_quant_config { arq_retrain { } }"
    model = AnyJob(tmp_path, config).create(net, x).train()
    largest = float(model.body(x).detach().abs().max())
    quantizer = model.head.act_quant
    for seen in (2, 4):
        assert not quantizer.calibrated
        model(x)
        assert quantizer.batches_seen == seen
    assert quantizer.calibrated and quantizer.clip_max > 2 * largest  # the second call is three times the first


def test_calibrate_and_integers(tmp_path: Path) -> None:
    net, x = net_and_input()
    model = AnyJob(tmp_path, "batch_num: 2\n" + BEST).create(net, x).eval()
    amct_ext.calibrate(model, [x, x])
    with torch.no_grad():
        expected = model(x)
        amct_ext.configure(model, forward="integer")
        assert off(model(x), expected) < 1e-2
        amct_ext.configure(model, forward="prepared")
        assert off(model(x), expected) < 1e-2


def test_a_transposed_convolution_of_three_dimensions_names_the_profile(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Conv3d(2, 4, 1), nn.ConvTranspose3d(4, 2, 2, 2)), torch.randn(1, 2, 4, 4, 4)
    report = amct_ext.explain(AnyJob(tmp_path, small.QUANT).create(net, x))
    assert report["1"].not_quantised == "AMCT leaves a ConvTranspose3d float (profile: BEST quantises it)"
    skip = 'quant_skip_types: "ConvTranspose3d"\n'
    with pytest.raises(ConfigError, match="ConvTranspose3d"):
        AnyJob(tmp_path, skip + small.QUANT).create(net, x)
    report = amct_ext.explain(AnyJob(tmp_path, skip + BEST).create(net, x))
    assert "quant_skip_types" in report["1"].not_quantised
