"""Channels in another order before the first 2:4 mask: the model's function, what the masks keep, restore."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, train
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.prune.permute import best_order

PERMUTE = "prune_config { n_out_of_m_pruner { l1_selective_prune { permute_channels: %s } } }\n"


def kept(weight: Tensor) -> Tensor:
    """The magnitude that a 2:4 mask along axis 1 keeps."""
    return weight.detach().abs()[amct_ext.ops.mask_2to4(weight.detach())].sum()


class Wide(nn.Module):
    """Convolutions with BatchNorm, a depthwise one, a flattened map, linear layers and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.depth, self.bn2 = nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 16, 1)
        self.own = nn.Parameter(torch.randn(24))
        self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 32)
        self.slope, self.three = nn.PReLU(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x[..., 1:-1, 1:-1] + torch.relu(self.bn2(self.depth(x)))
        x = torch.relu(self.point(x)).mean((2, 3))
        return self.three(self.slope(self.two(torch.relu(self.one(x)) * self.own)))


def build() -> nn.Module:
    torch.manual_seed(0)
    model = Wide()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def create(folder: Path, permute: str, model: nn.Module | None = None) -> nn.Module:
    (folder / "c.cfg").write_text(PERMUTE % permute)
    return amct_ext.create_compressed_retrain_model(
        build() if model is None else model, X, str(folder / "c.cfg"), str(folder / "r.txt")
    )


def test_the_order_keeps_more_and_is_the_same_each_time() -> None:
    torch.manual_seed(0)
    rows = torch.randn(64, 50).abs() * torch.rand(50)
    order = best_order(rows)
    assert sorted(order) == list(range(50)) and order[48:] == (48, 49)
    fours = [r[:, :48].reshape(64, 12, 4).topk(2).values.sum() for r in (rows, rows[:, list(order)])]
    assert fours[1] > 1.03 * fours[0]
    assert best_order(rows) == order


def test_the_function_stays_and_the_masks_keep_more(tmp_path: Path) -> None:
    plain, permuted, right = create(tmp_path, "false"), create(tmp_path, "true"), build()
    for layer in (m for m in permuted.modules() if getattr(m, "sparsity", None) is not None):
        layer.sparsity.mask.fill_(True)
        layer.sparsity._valid_mask.remember(layer.sparsity.mask)
    torch.testing.assert_close(permuted.eval()(X), right(X), rtol=1e-4, atol=1e-4)
    gains = {name: float(kept(permuted.get_parameter(name)) / kept(plain.get_parameter(name)))
             for name in ("depth.weight", "point.weight", "one.weight", "two.weight", "three.weight")}  # fmt: skip
    assert gains["one.weight"] > 1.005 and gains["point.weight"] > 1.005
    # Constants and parameters along the channels do not follow them, so those layers keep their order.
    assert torch.equal(permuted.two.weight, plain.two.weight) and torch.equal(permuted.three.weight, plain.three.weight)


def test_restore_brings_the_order_back(tmp_path: Path) -> None:
    config = (PERMUTE % "true") + small.QUANT
    job = Job(tmp_path, config)
    first = job.create()
    train(first, optimizer_of(first), range(3))
    expected, record = evaluate(first), job.record.read_text()
    torch.save({"model": first.state_dict()}, tmp_path / "state.pth")
    second = job.restore(tmp_path / "state.pth")
    assert_same_state(first, second)
    assert torch.equal(evaluate(second), expected)
    assert job.record.read_text() == record
    amct_ext.save_compressed_retrain_model(second, str(job.record), str(tmp_path / "net"), small.SAMPLE)


def test_the_callers_model_keeps_its_order(tmp_path: Path) -> None:
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    create(tmp_path, "true", model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["filter"])
def test_with_channel_pruning_in_the_same_job(tmp_path: Path, name: str) -> None:
    linear = f'override_layer_types {{ layer_type: "Linear" {PERMUTE % "true"} }}\n'
    model = Job(tmp_path, small.CONFIGS[name] + linear).create()
    assert torch.isfinite(evaluate(model)).all()


class ReadTwice(nn.Module):
    """A concatenation of one tensor with its negative (CReLU), and a residual layer, which makes what it reads."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.stem, self.residual = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1) if residual else None
        self.out = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        if self.residual is not None:
            x = x + self.residual(x)
        return self.out(torch.relu(torch.cat([x, -x], 1))).mean((2, 3))


@pytest.mark.parametrize("residual", [False, True])
def test_a_reader_that_holds_the_channels_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, residual: bool
) -> None:
    torch.manual_seed(0)
    model = ReadTwice(residual).eval()
    plain, permuted = create(tmp_path, "false", model), create(tmp_path, "true", model)
    assert "keep their order" not in caplog.text
    assert not torch.equal(plain.stem.weight, permuted.stem.weight)
    for layer in (m for m in permuted.modules() if getattr(m, "sparsity", None) is not None):
        layer.sparsity.mask.fill_(True)
        layer.sparsity._valid_mask.remember(layer.sparsity.mask)
    torch.testing.assert_close(permuted.eval()(X), model(X), rtol=1e-4, atol=1e-4)
