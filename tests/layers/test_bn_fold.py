"""BatchNorm behind a quantised convolution: factors of any sign and size, other names, other modules in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.checks.onnx_run import run_onnx
from support.jobs.any_job import PER_TENSOR, AnyJob, off
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.layers.bn_fold import fold_scale
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.record.text import read_record

CONVS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
CONFIGS = {"per tensor": PER_TENSOR, "per channel": small.QUANT, "learned": small.LEARNED}


def pair(dims: int = 2, groups: int = 1) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    conv, norm = CONVS[dims]
    net = nn.Sequential(conv(4, 8, 3, groups=groups), norm(8))
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
        net[1].weight.uniform_(0.5, 1.5)
        net[1].bias.normal_()
    return net.eval(), torch.randn(2, 4, *[5] * dims)


def recorded(job: AnyJob) -> list[float]:
    return [scale for entry in read_record(job.record).quant for scale in entry.scale_w]


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("factor", [0.0, 1e-44, -1e-44, 1e-38])
@pytest.mark.parametrize("channels", [slice(None), slice(2, 3)])
def test_factors_next_to_nothing(tmp_path: Path, config: str, factor: float, channels: slice) -> None:
    """An evaluation writes a record of positive scales, and those of other channels are what they were."""
    net, x = pair()
    with torch.no_grad():
        net[1].weight[channels] = factor
    job = AnyJob(tmp_path, CONFIGS[config])
    model = job.calibrated(net, x)
    seen = model.eval()(x)
    torch.testing.assert_close(seen[:, channels], net(x)[:, channels], rtol=0, atol=1e-6)
    scales = torch.tensor(recorded(job))
    assert bool((scales > 1e-31).all())
    with torch.no_grad():
        net[1].weight[channels] = 1.0
    other = job.calibrated(net, x)
    other.eval()(x)
    kept = torch.ones(8, dtype=torch.bool)
    kept[channels] = False
    assert torch.equal(scales[kept], torch.tensor(recorded(job))[kept])


@pytest.mark.parametrize(
    ("dims", "what"), [(1, "factor"), (2, "factor"), (3, "factor"), (2, "variance"), (2, "forward")]
)
def test_files_of_factors_next_to_nothing(tmp_path: Path, dims: int, what: str) -> None:
    net, x = pair(dims)
    with torch.no_grad():
        if what == "variance":
            net[1].running_var[:2] = torch.tensor([torch.inf, 1e30])
        else:
            net[1].weight[:] = torch.tensor([0.0, 1e-44, 1.0, -1.0, 0.0, 1e-38, 2.0, -1e-44])
    job = AnyJob(tmp_path, small.QUANT)
    model = job.calibrated(net, x)
    if what == "forward":
        amct_ext.configure(model, forward="integer")
    seen = model.eval()(x).detach()
    assert off(run_onnx(job.save(model, x)[0], x), seen) < 5e-3


def test_scales_that_are_no_numbers_stay_so() -> None:
    """They are refused where the record is written, as before."""
    norm = nn.BatchNorm2d(3, eps=0.0)
    norm.running_var.copy_(torch.tensor([0.0, 1.0, -1.0]))
    scales = fold_scale(torch.full((1,), 0.5), norm).detach()
    assert scales.isfinite().tolist() == [False, True, False]
    assert scales[1] == 0.5


@pytest.mark.parametrize("config", ["per tensor", "per channel"])
@pytest.mark.parametrize(("dims", "groups"), [(1, 1), (2, 4), (3, 1)])
def test_negative_factors(tmp_path: Path, config: str, dims: int, groups: int) -> None:
    """The codes of the evaluation reach the files, -128 too; only channels with such a code have a negative scale."""
    net, x = pair(dims, groups)
    with torch.no_grad():
        rows = net[0].weight.flatten(1)
        largest = rows.abs().max()
        rows[:4, 0] = -1.3 * largest  # the negative end decides
        rows[4:, 0] = 1.2 * largest
        net[1].weight[1::2] *= -1
    job = AnyJob(tmp_path, CONFIGS[config])
    model = job.calibrated(net, x)
    seen = model.eval()(x).detach()
    fake_quant, deploy = job.save(model, x)
    assert off(run_onnx(fake_quant, x), seen) < 2e-3  # bias steps
    tensors = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(deploy).graph.initializer}
    codes = tensors["0.weight"].reshape(8, -1)
    scales = tensors["0.dequant.param"].astype(np.uint32).view(np.float32)
    assert (scales < 0).tolist() == [False, True, False, True, False, False, False, False]
    assert codes.min() == -128
    assert bool((codes[:4].min(1) == -128).all())
    assert min(recorded(job)) > 0


class Named(nn.Module):
    """The BatchNorm stands at a second name, or in a list, and runs from there."""

    def __init__(self, how: str) -> None:
        super().__init__()
        conv, norm = pair()[0]
        self.how = how
        if how == "second name before":
            self.norm = norm
        self.conv = conv
        self.block = nn.Sequential(norm)
        if how == "second name after":
            self.norm = norm
        if how == "list":
            self.listed = [norm]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "list":
            return self.listed[0](x)
        return self.block(x) if self.how.endswith("before") else self.norm(x)


@pytest.mark.parametrize(
    ("how", "synchronised"),
    [
        ("second name before", False),
        ("second name before", True),
        ("second name after", False),
        ("second name after", True),
        ("list", False),  # convert_sync_batchnorm does not reach what is not registered
    ],
)
def test_other_names(tmp_path: Path, how: str, synchronised: bool) -> None:
    net, x = Named(how).eval(), pair()[1]
    job = AnyJob(tmp_path, small.QUANT)
    model = job.calibrated(net, x)
    seen = model.eval()(x).detach()
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fake_quant, deploy = job.save(model, x)
    assert off(run_onnx(fake_quant, x), seen) < 5e-3
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(deploy).graph.node}


class Twice(nn.Module):
    """One BatchNorm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = pair()[0]
        self.b = nn.Conv2d(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)) + self.norm(self.b(x))


def test_shared_by_two_convolutions(tmp_path: Path) -> None:
    job, x = AnyJob(tmp_path, small.QUANT), pair()[1]
    model = job.calibrated(Twice().eval(), x)
    seen = model.eval()(x).detach()
    assert off(run_onnx(job.save(model, x)[0], x), seen) < 5e-3


@pytest.mark.parametrize("config", [*CONFIGS, "2:4"])
def test_without_statistics(tmp_path: Path, config: str) -> None:
    """It normalises by the batch and stays as it is."""
    _, x = pair()
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 4, 1))
    model = AnyJob(tmp_path, CONFIGS.get(config, small.SPARSE % 0)).calibrated(net, x)
    seen = model.eval()(x).detach()
    expected = net(x).detach() if config != "2:4" else model[2](net[1](model[0](x)))
    assert off(seen, expected) < 0.1


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, getattr(norm, key).detach().clone())
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        factor = self.weight * (self.running_var + self.eps).rsqrt()
        return x * factor.view(-1, 1, 1) + (self.bias - self.running_mean * factor).view(-1, 1, 1)


def by_hand(model: nn.Module) -> nn.Module:
    """The usual fusion: the BatchNorm goes into the convolution and an Identity in its place."""
    fused = nn.utils.fuse_conv_bn_weights(
        *(model[0].weight, model[0].bias, model[1].running_mean, model[1].running_var),
        *(model[1].eps, model[1].weight, model[1].bias),
    )
    model[0].weight, model[0].bias = fused
    return nn.Identity()


@pytest.mark.parametrize("config", ["per tensor", "per channel"])
@pytest.mark.parametrize("exchange", [by_hand, lambda model: Frozen(model[1])], ids=["identity", "frozen"])
def test_exchanged_after_create(tmp_path: Path, config: str, exchange: Callable[[nn.Module], nn.Module]) -> None:
    net, x = pair()
    job = AnyJob(tmp_path, CONFIGS[config])
    model = job.calibrated(net, x)
    expected = net(x)
    model[1] = exchange(model)
    seen = model.eval()(x).detach()
    assert off(seen, expected) < 0.1
    assert off(run_onnx(job.save(model, x)[0], x), seen) < 5e-3
    assert amct_ext.shift_bits(model)["0"]


def test_a_deep_copy_follows_its_own_batchnorm(tmp_path: Path) -> None:
    net, x = pair()
    model = AnyJob(tmp_path, small.QUANT).calibrated(net, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight.fill_(3.0)
    ((_, ours),), ((_, theirs),) = compressed_layers(model), compressed_layers(twin)
    assert not torch.equal(ours.recorded_scale_w(), theirs.recorded_scale_w())
