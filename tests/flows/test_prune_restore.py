"""Networks beyond chains of layers: their record as a file restores a checkpoint bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models import small
from support.models.conv_blocks import conv, image
from support.models.net_of_function import Net
from torch import nn

import amct_ext
from amct_ext import verify_pruning
from amct_ext.prune.groups import INITIALIZER
from amct_ext.record.text import read_record


def layer_scale() -> nn.Module:
    net = Net(lambda m, x: m.out(m.norm((m.a(x) * m.gamma).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), a=conv(3, 16),
              norm=nn.LayerNorm(16), out=conv(16, 2))  # fmt: skip
    net.gamma = nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5)
    return net


def unit(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    one, two = m.a(x).chunk(2, 1)
    return m.out(F.channel_shuffle(torch.cat([one, m.b(F.relu(two))], 1), 2))


def shuffle_unit() -> nn.Module:
    return Net(unit, a=conv(3, 32), b=conv(16, 16), out=conv(32, 2))


def attention(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    b, n = x.shape[0], 64
    q, k, v = m.qkv(x.flatten(2).mT).reshape(b, n, 3, 2, m.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attending() -> nn.Module:
    net = Net(attention, qkv=nn.Linear(3, 96), out=nn.Linear(32, 2))
    net.head_dim = 16
    return net


def linked() -> nn.Module:
    return Net(lambda m, x: m.out(m.grouped(torch.cat([m.a(x), m.b(x)], 1))), a=conv(3, 16), b=conv(3, 16),
               grouped=conv(32, 16, groups=2), out=conv(16, 2))  # fmt: skip


@pytest.mark.parametrize("build", [layer_scale, shuffle_unit, attending, linked])
def test_restored_bit_for_bit(tmp_path: Path, build) -> None:
    config, record = str(tmp_path / "prune.cfg"), str(tmp_path / "record.txt")
    Path(config).write_text(small.FILTER)
    torch.manual_seed(0)
    whole, data = build(), image()
    state = whole.state_dict()
    model = amct_ext.create_prune_retrain_model(whole, data, config, record)
    comparison = verify_pruning(whole, model, data)
    assert comparison.error < 1e-5 and comparison.removed > 0
    members = [node for entry in read_record(record).channel for node in (*entry.producers, *entry.consumers)]
    if build is layer_scale:
        assert {(n.name, n.axis) for n in members if n.type == INITIALIZER} == {
            ("gamma", 1), ("norm.weight", 0), ("norm.bias", 0),
        }  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    other = build()
    other.load_state_dict(state)
    restored = amct_ext.restore_prune_retrain_model(other, data, record, config, str(tmp_path / "checkpoint.pth"))
    assert all(torch.equal(restored.state_dict()[key], value) for key, value in model.state_dict().items())
    assert torch.equal(restored.eval()(data), model.eval()(data))
