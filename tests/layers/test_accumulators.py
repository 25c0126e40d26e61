"""The shift search on the integer path: it sees the device's accumulators, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.checks.integer_forward import both, took_integers
from support.models import small
from support.models.single_layer import compressed
from torch import Tensor, nn

import amct_ext
from amct_ext import ops
from amct_ext.errors import RecordRangeError
from amct_ext.model_surgery.lookup import compressed_layers

PER_TENSOR = small.QUANT.replace("arq_retrain { }", "arq_retrain { channel_wise: false }")


def normalized() -> nn.Module:
    """A convolution before a BatchNorm whose factors have both signs."""
    net = nn.Sequential(nn.Conv2d(5, 20, 3, stride=2, padding=1), nn.BatchNorm2d(20))
    norm = net[1]
    with torch.no_grad():
        norm.weight.copy_(torch.randn(20) + 0.1)
        norm.bias.copy_(torch.randn(20))
        norm.running_mean.copy_(torch.randn(20))
        norm.running_var.copy_(torch.rand(20) + 0.5)
    norm.momentum = 0.0  # the calibrating step leaves them
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(5, 20, (3, 2), padding=(2, 0), dilation=(1, 2))), (3, 5, 7, 9)),
    "without bias": (lambda: nn.Sequential(nn.Conv2d(5, 20, 3, bias=False)), (3, 5, 7, 9)),
    "one position": (lambda: nn.Sequential(nn.Conv2d(5, 20, 3)), (3, 5, 3, 3)),
    "normalised": (normalized, (3, 5, 7, 9)),
    "linear": (lambda: nn.Sequential(nn.Linear(7, 4)), (50, 7)),
    "sequence": (lambda: nn.Sequential(nn.Linear(7, 40)), (3, 5, 7)),
    "vector": (lambda: nn.Sequential(nn.Linear(7, 4)), (7,)),
}


def integers(model: nn.Module, x: Tensor) -> tuple[np.ndarray, int]:
    """Accumulators of the one layer as Python's integers, with their channel axis; everything by the specification."""
    ((_, layer),) = compressed_layers(model)
    quantizer = layer.act_quant
    codes, _, offset, *_ = ops.ulq_quantize(
        x, quantizer.clip_max, quantizer.clip_min, quantizer.prev_clip_max, quantizer.prev_clip_min
    )
    centred = codes.double() - 128 - offset.double()
    scale = layer.weight_quant.current_scale(layer.weight)
    weight = ops.quantize_weight(layer.weight, scale, 8, 0 if scale.numel() > 1 else None).double()
    axis = x.dim() - 1
    if isinstance(layer, nn.Conv2d):
        axis = 1
        total = F.conv2d(centred, weight, None, layer.stride, layer.padding, layer.dilation)
    else:
        total = F.linear(centred, weight)
    made = total.detach().numpy().astype(np.int64).astype(object)
    deq = layer.deq_scale().double().numpy()
    bias = np.zeros(1) if layer.bias is None else layer.bias.detach().double().numpy()
    if len(model) > 1:
        norm = model[1]
        weights, shift, mean, variance = (
            t.detach().double().numpy() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        factor = weights / np.sqrt(variance + norm.eps)
        bias = (bias - mean) * factor + shift
        made = made * np.sign(factor).astype(int).astype(object).reshape(
            [-1 if i == axis else 1 for i in range(x.dim())]
        )
    steps = np.rint(bias / deq).astype(np.int64).astype(object)
    made = made + steps.reshape([-1 if i == axis else 1 for i in range(x.dim())])
    return np.clip(made, -(2**31), 2**31 - 1), axis


def shift_errors(made: np.ndarray, axis: int, rows: int) -> list[list[int]]:
    """Squared errors of the shifts 1 to 16, exact."""
    channels = [made.reshape(-1)] if rows == 1 else [made.take(c, axis).reshape(-1) for c in range(made.shape[axis])]
    return [
        [sum((max(-32768, min(32767, s >> n)) * 2**n - s) ** 2 for s in map(int, values)) for n in range(1, 17)]
        for values in channels
    ]


def searched(model: nn.Module, x: Tensor) -> Tensor:
    ((_, layer),) = compressed_layers(model.eval())
    with torch.no_grad():
        model(x)
    return layer.search_n.errors


@pytest.mark.parametrize("config", [small.QUANT, PER_TENSOR, small.LEARNED], ids=["channels", "tensor", "learned"])
@pytest.mark.parametrize("name", NETS)
def test_the_search_sees_the_accumulators(name: str, config: str, tmp_path: Path) -> None:
    make, shape = NETS[name]
    model = compressed(make(), torch.randn(shape), tmp_path, config)
    plain, model = both(model)
    x = torch.randn(shape)
    errors = searched(model, x)
    assert took_integers(model)
    made, axis = integers(model, x)
    spatial = made.size // (made.shape[0] * made.shape[axis])
    rows = 1 if errors.shape[0] == 1 or spatial == 1 else errors.shape[0]
    expected = torch.tensor(shift_errors(made, axis, rows), dtype=torch.float64)
    assert torch.equal(errors, expected.expand_as(errors))
    searched(plain, x)
    assert amct_ext.shift_bits(model) == amct_ext.shift_bits(plain)


def wide_layer(weight: float, tmp_path: Path) -> nn.Module:
    """As many weights as a sum of 32 bits can take, nearly all of them large and of one sign."""
    net = nn.Sequential(nn.Linear(65793, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.where(torch.rand(2, 65793) < 0.01, 1.0, weight))
        net[0].bias.zero_()
    return compressed(net, torch.rand(3, 65793) * 0.2 + 0.8, tmp_path)


@pytest.mark.parametrize("weight", [-1.28, -0.4])
def test_sums_that_floats_cannot_hold(weight: float, tmp_path: Path) -> None:
    """Beyond 2^24 the float output no longer tells neighbouring accumulators apart; the integers do."""
    plain, model = both(wide_layer(weight, tmp_path))
    x = torch.rand(3, 65793) * 0.2 + 0.8
    errors = searched(model, x)
    made, axis = integers(model, x)
    assert abs(made).max() > 2**26
    expected = torch.tensor(shift_errors(made, axis, 1), dtype=torch.float64)
    assert torch.equal(errors, expected.expand_as(errors))
    assert not torch.equal(searched(plain, x), errors)
    # What is lost is far below what a shift that fits drops.
    assert amct_ext.shift_bits(model) == amct_ext.shift_bits(plain)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_beyond_32_bits_saturates(sign: int, tmp_path: Path) -> None:
    model = compressed(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(2, 3, 5, 5), tmp_path)
    amct_ext.configure(model, forward="integer")
    with torch.no_grad():
        model[0].bias.fill_(sign * 1e9)
    x = torch.randn(2, 3, 5, 5)
    errors = searched(model, x)
    made, axis = integers(model, x)
    assert (made == (2**31 - 1 if sign > 0 else -(2**31))).all()
    assert torch.equal(errors, torch.tensor(shift_errors(made, axis, 4), dtype=torch.float64))


def test_a_scale_that_is_none_shows(tmp_path: Path) -> None:
    model = compressed(normalized(), torch.randn(2, 5, 7, 9), tmp_path)
    amct_ext.configure(model, forward="integer")
    with torch.no_grad():
        model[1].weight[3] = torch.inf
    with pytest.raises(RecordRangeError, match="positive"):  # a record of it cannot be written
        searched(model, torch.randn(2, 5, 7, 9))
    ((_, layer),) = compressed_layers(model)
    errors = layer.search_n.errors
    assert errors.isnan().all(1).tolist() == [c == 3 for c in range(20)]


def test_only_as_many_batches_as_asked_for(tmp_path: Path) -> None:
    """Sums are computed where the search wants them, and not kept."""
    model = compressed(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(2, 3, 5, 5), tmp_path)
    amct_ext.configure(model, forward="integer")
    ((_, layer),) = compressed_layers(model)
    first = searched(model, torch.randn(2, 3, 5, 5)).clone()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        again = searched(model, torch.randn(2, 3, 5, 5))
    assert torch.equal(first, again)
    names = {event.key for event in profile.key_averages()}
    assert "amct_ext::integer_conv2d" in names
    assert "amct_ext::integer_conv2d_accumulators" not in names
    assert layer.product_choice.pop_accumulators() is None
