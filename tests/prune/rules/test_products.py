"""Matrix products and convolutions by ops: summed channels are joined, the others are those of the result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.checks.planned_channels import planned
from support.checks.pruning_check import check_pruning, outputs, refusal, replay
from support.models.conv_blocks import conv, image
from support.models.net_of_function import Net
from torch import nn


def tokens(width=6, batch=2, count=5):
    return torch.randn(batch, count, width)


class Functional(nn.Conv2d):
    """A convolution with a forward of its own: standardised weights."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        weight = (self.weight - mean) / deviation
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """Pads by the size of its input."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Cast(nn.Linear):
    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, as GPT-2 has it."""

    def __init__(self, nx, nf):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


def sequence(*layers, channels=3, dims=2):
    return nn.Sequential(*layers), torch.randn(2, channels, *[6] * dims)


PRODUCTS = {
    "standardised weights": (
        lambda: sequence(conv(3, 8), Functional(8, 8, 3, padding=1), nn.ReLU(), Functional(8, 6, 3), conv(6, 2)),
        {"0", "1", "3"},
    ),
    "a subclass that pads": (
        lambda: sequence(Same(3, 8, 3), nn.ReLU(), Same(8, 8, 3, groups=8), Same(8, 6, 3), conv(6, 2)),
        {"0", "3"},
    ),
    "a subclass with groups": (
        lambda: sequence(conv(3, 8), Same(8, 12, 3, groups=2), nn.BatchNorm2d(12), conv(12, 2)), {"0", "1"},
    ),
    "a depthwise subclass with a multiplier": (
        lambda: sequence(Same(3, 6, 3), Same(6, 12, 3, groups=6), conv(12, 2)), {"0"},
    ),
    "Conv1d": (lambda: sequence(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 1), dims=1), {"0"}),
    "Conv3d": (
        lambda: sequence(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.Conv3d(8, 8, 1, groups=8), nn.Conv3d(8, 2, 1),
                         dims=3),
        {"0"},
    ),
    "transposed Conv1d": (
        lambda: sequence(nn.ConvTranspose1d(3, 8, 2, 2), nn.ReLU(), nn.ConvTranspose1d(8, 6, 2), nn.Conv1d(6, 2, 1),
                         dims=1),
        {"0", "2"},
    ),
    "transposed Conv3d": (
        lambda: sequence(nn.Conv3d(3, 8, 1), nn.ConvTranspose3d(8, 2, 2, 2), dims=3), {"0"},
    ),
    "casting linear": (
        lambda: (nn.Sequential(Cast(6, 8), nn.GELU(), Cast(8, 10, bias=False), nn.GELU(), Cast(10, 2)), tokens()),
        {"0", "2"},
    ),
    "functional linear of a layer": (
        lambda: (Net(lambda m, x: m.out(F.linear(x, m.a.weight, m.a.bias)), a=nn.Linear(6, 8), out=nn.Linear(8, 2)),
                 tokens()),
        {"a"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_lose_channels(name):
    torch.manual_seed(0)
    build, wanted = PRODUCTS[name]
    net, data = build()
    cut, stays = check_pruning(net, data, mixes=name.startswith("standardised"))
    assert cut == wanted, stays


def test_a_weight_of_no_layer_is_cut_where_a_layer_feeds_it():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(m.mid(F.gelu(m.a(x)))), a=nn.Linear(6, 8), mid=Conv1D(8, 4), out=nn.Linear(4, 2))
    cut, _ = check_pruning(net, tokens(), mixes=True)
    assert cut == {"a"}


def test_experts_in_one_parameter():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(torch.bmm(F.gelu(m.a(x)), m.w).sum(0)), a=nn.Linear(6, 8), out=nn.Linear(4, 2))
    net.w = nn.Parameter(torch.randn(3, 8, 4))
    cut, _ = check_pruning(net, tokens(batch=3), mixes=True)
    assert cut == {"a"}


def test_an_embedding_loses_columns():
    torch.manual_seed(0)
    net = Net(lambda m, x, i: m.out(m.table(i) + m.a(x)), a=nn.Linear(6, 8), table=nn.Embedding(9, 8),
              out=nn.Linear(8, 2))  # fmt: skip
    assert check_pruning(net, (tokens(), torch.randint(9, (2, 5))))[0] == {"a"}


def test_bilinear_products_of_two_layers():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out((m.a(x) @ m.b(x).transpose(1, 2)).softmax(-1) @ m.c(x)), a=nn.Linear(6, 8),
              b=nn.Linear(6, 8), c=nn.Linear(6, 7), out=nn.Linear(7, 2))  # fmt: skip
    assert check_pruning(net, tokens(), mixes=True)[0] == {"a", "b", "c"}


def test_a_product_of_channels_with_themselves():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out((lambda y: y @ (y.transpose(1, 2) @ y))(m.a(x))), a=nn.Linear(6, 8),
              out=nn.Linear(8, 2))  # fmt: skip
    assert check_pruning(net, tokens(), mixes=True)[0] == {"a"}


def test_einsum():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(torch.einsum("bnc,bmc->bnm", m.a(x), m.b(x)) @ m.c(x)), a=nn.Linear(6, 8),
              b=nn.Linear(6, 8), c=nn.Linear(6, 7), out=nn.Linear(7, 2))  # fmt: skip
    assert check_pruning(net, tokens(), mixes=True)[0] == {"a", "b", "c"}


def test_mixing_over_tokens():
    """MLP-Mixer: a linear layer over the tokens, between layers over the channels."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.t1, self.t2 = nn.Linear(5, 7), nn.Linear(7, 5)
            self.c1, self.c2 = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            x = x + self.t2(F.gelu(self.t1(self.norm(x).transpose(1, 2)))).transpose(1, 2)
            return x + self.c2(F.gelu(self.c1(self.norm2(x))))

    torch.manual_seed(0)
    cut, stays = check_pruning(nn.Sequential(nn.Linear(6, 8), Mixer(), Mixer(), nn.Linear(8, 3)), tokens(), mixes=True)
    assert cut == {"0", *(f"{i}.{name}" for i in (1, 2) for name in ("t1", "c1", "c2"))}, stays


def test_cut_by_hand():
    torch.manual_seed(0)
    net, data = (
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 2, 1)).eval(),
        torch.randn(2, 3, 9),
    )
    _, records = planned(net, data, ratio=0.5)
    keep = [i for i in range(8) if i not in records[0].producers[0].prune_index]
    y = F.conv1d(data, net[0].weight[keep], net[0].bias[keep])
    y = F.conv1d(y, net[1].weight[keep], net[1].bias[keep], groups=4)
    wanted = F.conv1d(y, net[2].weight[:, keep], net[2].bias)
    torch.testing.assert_close(outputs(replay(net, tuple(records), data), data)[0], wanted, rtol=1e-5, atol=1e-6)


REFUSED = {
    "a constant matrix": (lambda m, x: m.out(m.a(x) @ torch.ones(8, 8)), "whose channels stay"),
    "fast Fourier transform": (lambda m, x: m.out(torch.fft.fft(m.a(x)).real), "cannot follow"),
    "attention over channels": (
        lambda m, x: m.out((lambda y: F.scaled_dot_product_attention(y, y, y))(m.a(x).transpose(1, 2)[:, None])[
            :, 0].transpose(1, 2)), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_stay_are_told(name):
    torch.manual_seed(0)
    function, reason = REFUSED[name]
    net = Net(function, a=nn.Linear(6, 8), out=nn.Linear(8, 2))
    assert reason in refusal(net, tokens(), "a")


def test_convolutions_with_a_weight_that_stays():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(F.conv2d(m.a(x), torch.ones(8, 8, 1, 1))), a=conv(3, 8), out=conv(8, 2))
    assert "multiplies the channels by others that stay" in refusal(net, image(), "a")
    net = Net(lambda m, x: m.out(F.conv2d(m.a(x), torch.ones(8, 1, 1, 1), groups=8)), a=conv(3, 8), out=conv(8, 2))
    assert "by weights that stay" in refusal(net, image(), "a")
