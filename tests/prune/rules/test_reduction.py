"""Reductions, and ops that work along some axes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.checks.pruning_check import check_pruning, refusal
from support.models.conv_blocks import conv, image
from support.models.net_of_function import Net


def between(function, out=8, width=8):
    return Net(lambda m, x: m.out(function(m.a(x))), a=conv(3, width), out=conv(out, 2, 1))


def spatial(y):
    return F.max_pool2d(y, 3, 1, 1) + F.avg_pool2d(y, 3, 1, 1) + F.adaptive_max_pool2d(y, 1) + F.interpolate(
        F.adaptive_avg_pool2d(y, 4), scale_factor=2, mode="bicubic"
    )  # fmt: skip


def resized(y):
    y = F.interpolate(y, (6, 7), mode="nearest") + F.interpolate(y, (6, 7), mode="bilinear", antialias=True)
    return F.pad(y, (1, 1, 0, 2), mode="reflect") + F.pad(y, (1, 1, 0, 2), mode="replicate")


def sampled(y):
    grid = F.affine_grid(torch.eye(2, 3).expand(y.shape[0], 2, 3) * 0.9, [y.shape[0], 1, 5, 5], align_corners=False)
    return F.grid_sample(y, grid, align_corners=False)


REDUCED = {
    "means of positions": lambda y: y.mean((2, 3), keepdim=True) + y.std((2, 3), keepdim=True) + y.var(3, keepdim=True),
    "axes that go": lambda y: (y.sum(-1) + y.amax(3)).mean(2)[:, :, None, None],
    "extremes": lambda y: y.amax((2, 3), True) - y.amin((2, 3), True) + y.max(2, True)[0] + y.min(3, True).values,
    "means and variances": lambda y: (lambda v, m: (y - m) / v)(*torch.var_mean(y + 1, (2, 3), keepdim=True)),
    "standard deviations": lambda y: (lambda s, m: (y - m) / s)(*torch.std_mean(y + 1, (2, 3), keepdim=True)),
    "norms": lambda y: y.norm(dim=(2, 3), keepdim=True) + torch.linalg.vector_norm(y, 1, dim=3, keepdim=True),
    "along positions": lambda y: y.softmax(2) + y.log_softmax(3) + y.cumsum(3) + y.sort(2)[0],
    "products and indices": lambda y: y.prod(3, True) + y.logsumexp((2, 3), True) + y.argmax(3, True),
    "softmax of all positions": lambda y: y * y.flatten(2).softmax(-1).view_as(y),
    "pooled": spatial,
    "resized": resized,
    "sampled": sampled,
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCED)
def test_channels_pass(name):
    torch.manual_seed(0)
    cut, stays = check_pruning(between(REDUCED[name]), image())
    assert cut == {"a"}, stays


MIXED = {
    "a gate from the mean": lambda y: y * y.mean(1, keepdim=True).sigmoid(),
    "a gate from extremes": lambda y: y * torch.cat([y.amax(1, True), y.mean(1, True)], 1).mean(1, True).sigmoid(),
    "whitened": lambda y: (y - y.mean((1, 2, 3), keepdim=True)) / y.std((1, 2, 3), keepdim=True),
    "of unit length": lambda y: y / torch.linalg.vector_norm(y, dim=1, keepdim=True),
    "of all elements": lambda y: y / y.abs().sum(),
}


@pytest.mark.parametrize("name", MIXED)
def test_statistics_over_channels_leave_out_what_goes(name):
    torch.manual_seed(0)
    cut, stays = check_pruning(between(MIXED[name]), image(), mixes=True)
    assert cut == {"a"}, stays


def test_channel_attention_by_pooled_maps_mixes_no_ids():
    """CBAM: maximum and mean over the channels, side by side, are channels of their own that stay."""
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out((lambda y: y * m.gate(torch.cat([y.mean(1, True), y.amax(1, True)], 1)).sigmoid())(
        m.a(x))), a=conv(3, 8), gate=conv(2, 1), out=conv(8, 2))  # fmt: skip
    cut, _ = check_pruning(net, image(), mixes=True)
    assert cut == {"a"}


REFUSED = {
    "softmax": lambda y: y.softmax(1),
    "cumulative sum": lambda y: y.cumsum(1),
    "sorting": lambda y: y.sort(1)[0],
    "the largest channel": lambda y: y.argmax(1, True).float() + y,
    "a product": lambda y: y * y.prod(1, True),
    "log of sums": lambda y: y - y.logsumexp(1, True),
    "pooling along the channels": lambda y: F.max_pool2d(y.transpose(1, 3), 3, 1, 1).transpose(1, 3),
    "resizing along the channels": lambda y: F.interpolate(y[:, None], (8, 4, 4))[:, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_stay_are_told(name):
    torch.manual_seed(0)
    reason = refusal(between(REFUSED[name]), image(), "a")
    assert "along the channels" in reason, reason
