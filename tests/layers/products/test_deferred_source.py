"""The sources of deferred tensors: whoever reads or writes one gets the values of plain tensors."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import amct_ext
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.products.deferred_conv import DeferredConv2d
from amct_ext.layers.products.deferred_source import ComputedValues, DeferPolicy, DeferredSource, PaddedValues
from amct_ext.layers.products.deferred_tensor import DeferredTensor, materialize
from amct_ext.layers.products.integer_ops import ConvGeometry
from amct_ext.layers.products.prepared_conv import PreparedConv2d
from amct_ext.layers.products.prepared_weight import PreparedConvWeight


def convolution(channels_last: bool = False) -> tuple[DeferredConv2d, Tensor]:
    """One with a bias, and its values."""
    codes = torch.randint(0, 256, (2, 5, 6, 7), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    packed = amct_ext.ops.pack_weight(torch.randn(4, 5, 3, 3), torch.full((4,), 0.02))
    activation = codes, torch.tensor(0.05), torch.tensor(-100.0)
    made = DeferredConv2d(
        activation, packed, torch.rand(4), torch.randn(4), ((3, 3), (1, 1), (1, 1), (1, 1)), channels_last
    )
    return made, made.compute()


def prepared_convolution(channels_last: bool) -> PreparedConv2d:
    x = torch.randn(2, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
    weight = PreparedConvWeight(torch.randn(4, 5, 3, 3), torch.randn(4), geometry, 1, x.shape)
    return PreparedConv2d(x, weight, geometry, channels_last)


def held_values(channels_last: bool) -> ComputedValues:
    return ComputedValues(torch.randn(2, 4, 6, 7).contiguous(memory_format=torch.channels_last), channels_last)


def padded_values(channels_last: bool) -> PaddedValues:
    values = torch.randn(2, 4, 4, 6).contiguous(memory_format=torch.channels_last)
    return PaddedValues(values, channels_last, (1, 0, 0, 2))


SOURCES: dict[str, Callable[[bool], DeferredSource]] = {
    "integers": lambda channels_last: convolution(channels_last)[0],
    "packed floats": prepared_convolution,
    "values": held_values,
    "padded values": padded_values,
}


def deferred_tensor(channels_last: bool = False, kind: str = "integers") -> tuple[Tensor, Tensor]:
    source = SOURCES[kind](channels_last)
    values = source.compute()
    return DeferredTensor(source, values.shape), values


def assert_same(result: Tensor, expected: Tensor, kind: str) -> None:
    """Equal; to the rounding of oneDNN's activation functions and sums on packed floats."""
    if kind == "integers":
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-6)


READERS: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "asarray": lambda x: torch.from_numpy(np.asarray(x)),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "dlpack": lambda x: torch.from_dlpack(x),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "repr": repr,
    "data": lambda x: x.data,
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "index": lambda x: x[1, 2],
    "view": lambda x: x.unflatten(1, (2, 2)),
    "item": lambda x: x.sum().item(),
    "cat": lambda x: torch.cat([x, x], 1),
    "out": lambda x: torch.exp(x, out=torch.empty(x.shape)),
    "scripted": lambda x: torch.jit.script(nn.Hardswish())(x),
    "memory": lambda x: (x.untyped_storage().nbytes(), x.data_ptr() == 0),
    "softmax": lambda x: x.softmax(1),
    "added to": lambda x: torch.ones(x.shape).add_(x),
    "scaled sum": lambda x: torch.add(x, torch.ones(x.shape), alpha=2),
    "broadcast sum": lambda x: x + torch.ones(4, 1, 1),
    "sum with itself": lambda x: x + x,
    "number added": lambda x: x + 1.5,
    "relu": lambda x: x.relu(),
    "two bounds": lambda x: nn.functional.relu6(x).relu(),
    "narrow bounds": lambda x: nn.functional.hardtanh(x.relu(), -3.0, -1.0),
    "silu": nn.functional.silu,
    "hardswish": nn.functional.hardswish,
    "gelu behind relu": lambda x: nn.functional.gelu(x.relu()),
    "sum behind relu": lambda x: x.relu() + torch.ones(x.shape),
    "sum of two": lambda x: x + x.relu(),
    "sum of sums": lambda x: ((x + x.relu()) + x.sigmoid()).relu(),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "pooled average": lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
    "joined": lambda x: torch.cat([x.relu(), x], 1).relu(),
    "padded": lambda x: nn.functional.pad(x, (1, 2, 0, 1)),
    "padded twice": lambda x: nn.functional.pad(nn.functional.pad(x, (1, 1)), (0, 1, 2, 0)).relu(),
    "padded with ones": lambda x: nn.functional.pad(x, (1, 1, 1, 1), value=1.0),
    "cropped": lambda x: nn.functional.pad(x, (-1, 0, 0, 0)),
    "not padded": lambda x: nn.functional.pad(x.relu(), (0, 0)),
    "pool": lambda x: nn.functional.max_pool2d(x, 2),
    "pool with places": lambda x: nn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)[1],
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_readers(name: str, channels_last: bool, kind: str) -> None:
    x, values = deferred_tensor(channels_last, kind)
    assert x.stride() == values.stride() and x.is_contiguous() is not channels_last and x.dtype == torch.float32
    with torch.no_grad():
        result, expected = READERS[name](x), READERS[name](values)
    if not isinstance(expected, Tensor):
        assert result == expected
        return
    assert type(materialize(result)) is Tensor
    assert_same(result, expected, kind)
    assert result.stride() == expected.stride()


WRITERS: dict[str, Callable[[Tensor], object]] = {
    "relu_": lambda x: x.relu_(),
    "hardtanh_": lambda x: nn.functional.hardtanh(x, -0.2, 0.3, inplace=True),
    "add_": lambda x: x.add_(torch.ones(x.shape)),
    "mul_": lambda x: x.mul_(2),
    "index": lambda x: x.__setitem__(0, 7.0),
    "flat": lambda x: x.flatten().zero_() if x.is_contiguous() else x.permute(0, 2, 3, 1).zero_(),
    "view": lambda x: x[:, 1].zero_(),
    "silu_": lambda x: nn.functional.silu(x, inplace=True),
    "hardswish_": lambda x: nn.functional.hardswish(x, inplace=True),
    "added to": lambda x: x.add_(x.relu()),
    "after a reader": lambda x: (x.sum(), x.relu_()),
    "another axis": lambda x: x.unsqueeze_(0),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_writers(name: str, channels_last: bool, kind: str) -> None:
    """What is written in place is seen by all who hold the tensor, and not by what was made of it before."""
    x, values = deferred_tensor(channels_last, kind)
    with torch.no_grad():
        x.channels_last_values()  # a layer has read it
        before, expected = x.relu(), values.relu()
        alias = x
        WRITERS[name](x)
        WRITERS[name](values)
        assert alias.shape == values.shape
        assert_same(materialize(alias), values, kind)
        assert_same(materialize(before), expected, kind)


def test_what_it_was_made_of_may_change() -> None:
    x, values = deferred_tensor()
    norm, addend = nn.BatchNorm2d(4).double().eval(), torch.randn(values.shape)
    nn.init.normal_(norm.running_mean)
    with torch.no_grad():
        expected = (norm(values.double()).float(), values + addend)
        kept = norm.running_mean.clone()
        y, z = norm(x), x + addend
        assert torch.equal(norm.running_mean, kept)
        norm.running_mean.zero_()
        addend.zero_()
        torch.testing.assert_close(materialize(y), expected[0])
        assert torch.equal(z, expected[1])


def test_gradients_of_what_follows() -> None:
    x, values = deferred_tensor()
    found = []
    for each in (x, values):
        norm = nn.BatchNorm2d(4).eval()
        norm(each).sum().backward()
        found.append(norm.weight.grad)
    assert torch.equal(found[0], found[1])


def test_training_statistics_are_taken_of_values() -> None:
    x, values = deferred_tensor()
    norm, other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    with torch.no_grad():
        assert torch.equal(norm(x), other(values)) and torch.equal(norm.running_mean, other.running_mean)


def test_copies_of_what_counts() -> None:
    tracker = ForwardTracker()
    tracker.enter(sys._getframe())
    assert tracker.forward_id == 1
    assert copy.deepcopy(tracker).forward_id is None
    file = io.BytesIO()
    torch.save(deferred_tensor()[0], file)
    file.seek(0)
    assert type(torch.load(file)) is Tensor
    assert DeferPolicy().allowed
