"""Layers and inputs that the integer forward does not take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checks.integer_forward import both, took_integers
from support.models.single_layer import Chain, compressed
from torch import nn

import amct_ext

ON_FLOATS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 5)),
    "uneven padding": (lambda: nn.Conv2d(5, 4, 2, padding="same"), (2, 5, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(5, 4, 3), (2, 5, 7, 7)),
    "one axis": (lambda: nn.Conv1d(5, 4, 3), (2, 5, 7)),
}


@pytest.mark.parametrize("kind", ON_FLOATS)
def test_layers_without_an_integer_kernel_stay_on_floats(kind: str, tmp_path: Path) -> None:
    build, shape = ON_FLOATS[kind]
    plain, model = both(compressed(Chain(build()), torch.randn(shape), tmp_path))
    x = torch.randn(shape)
    assert torch.equal(plain(x), model(x))
    assert amct_ext.forward_choices(model) == {"layer": "float"}


def test_an_image_without_a_batch_stays_on_floats(tmp_path: Path) -> None:
    plain, model = both(compressed(Chain(nn.Conv2d(5, 4, 3)), torch.randn(2, 5, 7, 7), tmp_path))
    x = torch.randn(5, 7, 7)
    assert torch.equal(plain(x), model(x)) and not took_integers(model)


def test_other_dtypes_and_autocast_stay_on_floats(tmp_path: Path) -> None:
    plain, model = both(compressed(Chain(nn.Linear(8, 4)), torch.randn(3, 8), tmp_path))
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), model(x))
    assert not took_integers(model)
    assert torch.equal(plain.double()(x.double()), model.double()(x.double()))
    assert not took_integers(model)


def test_bits_beyond_eight_stay_on_floats(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Linear(8, 4)), torch.randn(3, 8), tmp_path)
    model.layer.act_quant.num_bits = 16
    amct_ext.configure(model, forward="integer")
    model(torch.randn(3, 8))
    assert not took_integers(model)


def test_compiled_graphs_multiply_floats(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    x = torch.randn(2, 4, 8, 8)
    expected = model(x)
    amct_ext.configure(model, forward="integer")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
