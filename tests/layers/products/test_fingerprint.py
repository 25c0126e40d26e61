"""Packed weights follow writes through .data, which raise no version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checks.integer_forward import both, took_integers
from support.models import small
from support.models.single_layer import compressed
from torch import Tensor, nn

import amct_ext
from amct_ext import ops
from amct_ext.layers.products.fingerprint import fingerprint

EXCHANGES: dict[str, Callable[[Tensor], object]] = {
    "copied": lambda p: p.data.copy_(torch.randn_like(p) * 0.3),
    "scaled": lambda p: p.data.mul_(-0.5),
    "moved": lambda p: p.data.add_(0.1),
    "reversed": lambda p: p.data.copy_(p.data.flip(-1)),
    "exchanged": lambda p: setattr(p, "data", p.data.roll(1, 0) * 1.5),
    "by numpy": lambda p: np.negative(p.detach().numpy(), out=p.detach().numpy()),
    "one value": lambda p: p.data.view(-1)[-1].add_(2.0),
    "by another tensor": lambda p: torch.from_dlpack(p.detach()).mul_(3.0),
}


class Exchanged(nn.Module):
    """Whatever an evaluation reads."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, channels, 3), nn.BatchNorm2d(channels)
        self.second, self.head = nn.Conv2d(channels, channels, 3), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("config", ["quant", "learned", "sparse_quant"])
@pytest.mark.parametrize("way", EXCHANGES)
def test_weights_written_through_data(way: str, config: str, tmp_path: Path) -> None:
    """No version is raised, and the next evaluation uses what was written, as that on floats does."""
    x = torch.randn(2, 4, 8, 8)
    model = compressed(Exchanged(), x, tmp_path, small.CONFIGS[config]).eval()
    plain, model = both(model)
    with torch.no_grad():
        model(x)
        for name, parameter in model.named_parameters():
            if "clip" in name or ("scale" in name and way not in ("scaled", "one value")):
                continue
            before, versions = model(x), parameter._version
            EXCHANGES[way](parameter)
            assert parameter._version == versions
            if "scale" in name:
                parameter.data.abs_()
            plain.get_parameter(name).data.copy_(parameter)
            y, want = model(x), plain(x)
            torch.testing.assert_close(y, want, rtol=0.02, atol=0.02 * float(want.abs().max()), msg=f"{name}, {way}")
            if name in ("first.weight", "head.weight", "head.bias") and (way, config) != ("one value", "sparse_quant"):
                assert not torch.equal(y, before), name
    assert took_integers(model)


@pytest.mark.parametrize("key", ["norm.running_mean", "norm.running_var", "second.act_quant.clip_max"])
def test_statistics_and_clips_written_through_data(key: str, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8, 8)
    plain, model = both(compressed(Exchanged(), x, tmp_path).eval())
    with torch.no_grad():
        before = model(x)
        for each in (plain, model):
            dict([*each.named_parameters(), *each.named_buffers()])[key].data.mul_(2.5)
        y, want = model(x), plain(x)
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02 * float(want.abs().max()))
    assert not torch.equal(y, before)


def test_masks_written_through_data(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8, 8)
    plain, model = both(compressed(Exchanged(), x, tmp_path, small.CONFIGS["sparse_quant"]).eval())
    with torch.no_grad():
        before = model(x)
        for each in (plain, model):
            mask = each.second.sparsity.mask
            mask.data.copy_(ops.mask_2to4(torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))))
        y, want = model(x), plain(x)
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02 * float(want.abs().max()))
    assert not torch.equal(y, before)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "with holes"])
def test_large_weights_written_through_data(layout: str, tmp_path: Path) -> None:
    """Of which a sample is looked at; a row in a matrix of such size shows in it."""
    shapes = {
        "contiguous": (512, 96),
        "transposed": (512, 96),
        "with holes": (96, 512),
        "channels last": (64, 32, 3, 3),
    }
    w = torch.randn(shapes[layout])
    if layout == "channels last":
        w = w.to(memory_format=torch.channels_last)
    if layout == "transposed":
        w = w.t()
    if layout == "with holes":
        w = torch.cat([w, w], 1)[:, ::2]
    seen = {fingerprint(w, 64)}
    assert fingerprint(w, 64) in seen
    for write in (lambda: w.data.neg_(), lambda: w.data.copy_(w.flip(0)), lambda: w.data.mul_(1.0001)):
        write()
        assert fingerprint(w, 64) not in seen
        seen.add(fingerprint(w, 64))
    for value in w.data.view(-1)[:: w.numel() // 50] if w.is_contiguous() else []:
        value.add_(1.0)
        assert fingerprint(w) not in seen
        seen.add(fingerprint(w))


def test_evaluations_keep_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4, 8, 8)
    model = compressed(Exchanged(80), x, tmp_path).eval()
    amct_ext.configure(model, forward="integer")
    with torch.no_grad():
        y = model(x)
        monkeypatch.setattr(ops, "pack_weight", None)
        assert torch.equal(model(x), y)
