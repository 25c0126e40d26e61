"""Attention: heads lose channels alike, and its softmax stays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.checks.planned_channels import planned
from support.checks.pruning_check import check_pruning, replay
from support.jobs.any_job import AnyJob
from support.models import small
from torch import nn

import amct_ext


def tokens(width=6, batch=2, count=5):
    return torch.randn(batch, count, width)


class Attention(nn.Module):
    """Multi-head attention; scale: given, or None for the root of the size of a head. explicit: without SDPA."""

    def __init__(self, width=8, heads=2, size=8, scale=None, explicit=False, norm=None, shared=1, mask=False):
        super().__init__()
        self.heads, self.head_dim, self.kv_heads = heads, size, heads // shared
        self.q = nn.Linear(width, heads * size)
        self.kv = nn.Linear(width, 2 * self.kv_heads * size)
        self.out = nn.Linear(heads * size, width)
        self.q_norm, self.k_norm = (norm(size), norm(size)) if norm else (nn.Identity(), nn.Identity())
        self.scale, self.explicit, self.mask = scale, explicit, mask

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q_norm(self.q(x).view(b, n, self.heads, self.head_dim)).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        k, shared = self.k_norm(k), self.heads // self.kv_heads
        if self.explicit:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
            weights = (q @ k.transpose(-2, -1) * (self.scale or 1)).softmax(-1)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.mask, scale=self.scale, enable_gqa=shared > 1)
        return self.out(y.transpose(1, 2).flatten(2))


def attended(**settings):
    return nn.Sequential(nn.Linear(6, 8), Attention(**settings), nn.Linear(8, 2))


ATTENTION = {
    "scaled by the size of a head": {},
    "with a given scale": {"scale": 0.25},
    "causal": {"mask": True},
    "explicit": {"explicit": True, "scale": 0.3},
    "explicit without scale": {"explicit": True},
    "queries and keys with a norm": {"norm": nn.RMSNorm, "scale": 0.3},
    "queries and keys with a norm, scaled by the size": {"norm": nn.RMSNorm},
    "LayerNorm for each head, scaled by the size": {"norm": nn.LayerNorm},
    "LayerNorm for each head": {"norm": nn.LayerNorm, "explicit": True, "scale": 0.3},
    "grouped queries": {"heads": 4, "shared": 2},
    "grouped queries, explicit": {"heads": 4, "shared": 2, "explicit": True},
    "one key for all queries": {"heads": 4, "shared": 4, "scale": 0.2},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_loses_channels_in_each_head(name):
    torch.manual_seed(0)
    settings = ATTENTION[name]
    cut, stays = check_pruning(attended(**settings), tokens(), mixes=True)
    assert cut >= {"1.q", "1.kv"}, stays


def test_attention_without_a_scale_keeps_its_softmax():
    """Queries are multiplied by sqrt(kept / all), as the smaller head divides by a smaller root."""
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Identity(), Attention(width=6), nn.Linear(6, 2)).eval(), tokens()
    _, records = planned(net, data, ratio=0.5)
    pruned = replay(net, tuple(records), data)
    size = pruned[1].head_dim
    assert size == 4 and pruned[1].q.out_features == 8
    removed = {index for record in records for n in record.producers if n.name == "1.q" for index in n.prune_index}
    kept = [index for index in range(16) if index not in removed]
    torch.testing.assert_close(pruned[1].q.weight, net[1].q.weight[kept] * math.sqrt(0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(pruned[1].q.bias, net[1].q.bias[kept] * math.sqrt(0.5), rtol=1e-6, atol=0)


def test_multihead_attention_of_torch_keeps_its_channels_and_its_neighbours_go():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.b(F.gelu(self.a(x)))

    cut, _ = check_pruning(nn.Sequential(Block(), Block()), tokens(8), mixes=True)
    assert {"0.a", "1.a"} <= cut


class PartlyRotated(nn.Module):
    """Attention whose heads turn their first half by position (Phi, GPT-NeoX); fused: one layer for q, k and v."""

    def __init__(self, fused):
        super().__init__()
        self.head_dim, self.rotary_ndims, self.fused = 16, 8, fused
        self.qkv = nn.Linear(8, 96) if fused else nn.ModuleList(nn.Linear(8, 32) for _ in range(3))
        self.out = nn.Linear(32, 8)
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.3, 0.1, 0.03]))

    def rotated(self, x):
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.inv_freq
        angle = torch.cat([angle, angle], -1)
        turned, rest = x[..., : self.rotary_ndims], x[..., self.rotary_ndims :]
        half = turned.shape[-1] // 2
        other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
        return torch.cat([turned * angle.cos() + other * angle.sin(), rest], -1)

    def forward(self, x):
        b, n, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(b, n, -1, 3 * self.head_dim).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = (layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in self.qkv)
        scores = self.rotated(q) @ self.rotated(k).transpose(-2, -1) * 0.3
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
def test_heads_of_which_a_part_is_turned_by_position(fused, tmp_path):
    """The frequencies are common to all heads, the rest of a head is its own: both parts lose the same share."""
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(6, 8), PartlyRotated(fused), nn.Linear(8, 2)).eval(), tokens()
    job = AnyJob(tmp_path, small.FILTER)
    pruned = amct_ext.create_compressed_retrain_model(net, data, job.config, job.record)
    attention = pruned[1]
    assert (attention.head_dim, attention.rotary_ndims, len(attention.inv_freq)) == (8, 4, 2)
    assert amct_ext.verify_pruning(net, pruned, data).error < 1e-5
    torch.save(pruned.state_dict(), tmp_path / "s.pth")
    files = job.config, job.record, str(tmp_path / "s.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, data, *files)
    assert torch.equal(restored(data), pruned(data))


class BetweenChannels(nn.Module):
    """Attention whose scores are between channels (XCiT, DaViT)."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.out = 2, nn.Linear(8, 96), nn.Linear(32, 8)
        self.temperature = nn.Parameter(torch.rand(2, 1, 1))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.out((scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))


def test_attention_between_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), BetweenChannels(), nn.Linear(8, 2))
    cut, stays = check_pruning(net, tokens(), mixes=True)
    assert cut >= {"0", "1.qkv"}, stays
