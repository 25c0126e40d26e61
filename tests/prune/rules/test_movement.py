"""Channels through ops that move elements: the ids of the channels go through the op itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.checks.pruning_check import check_pruning, refusal
from support.models.conv_blocks import conv, image
from support.models.net_of_function import Net
from torch import nn


def between(function, width=8, out=8, **layers):
    """A network with a function of one tensor between two convolutions."""
    return lambda: Net(lambda m, x: m.out(function(m, m.a(x))), a=conv(3, width), out=conv(out, 2), **layers)


def shuffle(y, groups):
    b, c, h, w = y.shape
    return y.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle_unit(m, x):
    one, two = m.a(x).chunk(2, 1)
    return m.out(shuffle(torch.cat([one, m.b(F.relu(m.depth(two)))], 1), 2))


def res2net(m, x):
    parts = torch.split(m.a(x), m.width, 1)
    outputs, y = [parts[0]], 0
    for layer, part in zip((m.c1, m.c2), parts[1:], strict=False):
        y = layer(part + y)
        outputs.append(y)
    return m.out(torch.cat([*outputs, parts[3]], 1))


def c2f(m, x):
    parts = list(m.a(x).chunk(2, 1))
    parts.append(m.b2(F.silu(m.b1(parts[-1]))) + parts[-1])
    parts.append(m.c2(F.silu(m.c1(parts[-1]))) + parts[-1])
    return m.out(torch.cat(parts, 1))


def halves(m, y):
    return y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :].sigmoid()


def with_width(net, **sizes):
    vars(net).update(sizes)
    return net


def windows(m, y):
    b, c, h, w = y.shape
    y = y.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(b, c, h, w)


def merged_patches(m, y):
    y = y.permute(0, 2, 3, 1)
    y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
    return y.permute(0, 3, 1, 2)


MOVED = {
    "views": (between(lambda m, y: y.flatten(2).unflatten(2, (4, 16)).reshape(y.shape).view(y.shape)), {"a"}),
    "permutations": (between(lambda m, y: y.permute(1, 2, 3, 0).transpose(0, 3).movedim(3, 1).swapaxes(2, 3)), {"a"}),
    "2-D transpose": (
        lambda: Net(lambda m, x: m.out(m.a(x.flatten()[:6].view(2, 3)).t().contiguous().t()), a=nn.Linear(3, 8),
                    out=nn.Linear(8, 2)),
        {"a"},
    ),
    "axes of one": (between(lambda m, y: y.unsqueeze(1).squeeze(1)[:, :, None].squeeze()), {"a"}),
    "expand and repeat": (between(lambda m, y: y[:, :, :1].expand(-1, -1, 8, -1).repeat(1, 1, 2, 1)), {"a"}),
    "repeated channels": (between(lambda m, y: y.repeat(1, 2, 1, 1), out=16), {"a"}),
    "interleaved repeats": (
        between(lambda m, y: y[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, -1, 8, 8), out=24), {"a"},
    ),
    "flipped": (between(lambda m, y: y.flip(1)), {"a"}),
    "flipped and added": (between(lambda m, y: y + y.flip(1)), set()),
    "rolled": (between(lambda m, y: y.roll((1, 2), (2, 3))), {"a"}),
    "padded": (between(lambda m, y: F.pad(F.pad(y, (1, 1, 0, 0)), (0, 1), value=3.0)[..., :8]), {"a"}),
    "padded with channels": (between(lambda m, y: F.pad(y, (0, 0, 0, 0, 0, 3)), out=11), {"a"}),
    "cropped": (between(lambda m, y: y[..., 1:-1, ::2][:, :, 0:3]), {"a"}),
    "one position": (between(lambda m, y: y[:, :, 3, None, 2:3]), {"a"}),
    "rows unbound": (between(lambda m, y: torch.stack(y.unbind(2)[::-1], 2)), {"a"}),
    "split halves": (between(lambda m, y: (lambda a, b: a * b.tanh())(*y.chunk(2, 1)), out=4), {"a"}),
    "sliced halves": (between(halves, out=4), {"a"}),
    "split, parts kept apart": (
        lambda: with_width(Net(lambda m, x: (lambda p: m.out(p[0]) + m.two(p[1]))(m.a(x).split(m.split_sizes, 1)),
                               a=conv(3, 10), out=conv(6, 2), two=conv(4, 2)), split_sizes=[6, 4]),
        {"a"},
    ),
    "pixel shuffle": (between(lambda m, y: F.pixel_shuffle(y, 2), width=16, out=4), {"a"}),
    "pixel unshuffle": (between(lambda m, y: F.pixel_unshuffle(y, 2), out=32), {"a"}),
    "channel shuffle": (between(lambda m, y: F.channel_shuffle(y, 4)), {"a"}),
    "shuffled by views": (between(lambda m, y: shuffle(y, 4), 16, 16), {"a"}),
    "ShuffleNet unit": (
        lambda: Net(shuffle_unit, a=conv(3, 12), depth=conv(6, 6, groups=6), b=conv(6, 6), out=conv(12, 2)),
        {"a", "b"},
    ),
    "Res2Net": (
        lambda: with_width(Net(res2net, a=conv(3, 16), c1=conv(4, 4), c2=conv(4, 4), out=conv(16, 2)), width=4),
        {"a", "c1", "c2"},
    ),
    "C2f": (
        lambda: Net(c2f, a=conv(3, 12), b1=conv(6, 4), b2=conv(4, 6), c1=conv(6, 5), c2=conv(5, 6), out=conv(24, 2)),
        {"a", "b1", "b2", "c1", "c2"},
    ),
    "windows": (between(windows), {"a"}),
    "merged patches": (between(merged_patches, out=32), {"a"}),
    "channels last": (
        between(lambda m, y: y.contiguous(memory_format=torch.channels_last).flatten(2).mT.mT.unflatten(2, (8, 8))),
        {"a"},
    ),
    "copies of shape": (between(lambda m, y: torch.empty_like(y).copy_(y) + torch.randn_like(y) * 0), {"a"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_channels_are_followed(name):
    torch.manual_seed(0)
    build, wanted = MOVED[name]
    cut, stays = check_pruning(build(), image())
    assert cut == wanted, stays


def test_kept_channels_are_those_cut_by_hand_from_a_shuffle_unit():
    """The cut network is built by hand in torch: only its weights come from the whole one."""
    import copy

    from support.checks.planned_channels import planned
    from support.checks.pruning_check import outputs, replay

    torch.manual_seed(0)
    net, data = MOVED["ShuffleNet unit"][0]().eval(), image()
    _, records = planned(net, data, ratio=0.5)
    pruned = replay(net, tuple(records), data)
    removed = {n.name: list(n.prune_index) for record in records for n in record.producers if n.prune_index}
    by_hand = copy.deepcopy(net)
    assert removed.keys() == {"a", "b"}
    places: dict[str, set[int]] = {}
    for record in records:
        for node in record.producers:
            places.setdefault(node.name, set()).update(node.prune_index)
    # Without cutting: channels of a and b are zeroed, and out reads only what is left.
    with torch.no_grad():
        for name, indices in places.items():
            layer = by_hand.get_submodule(name)
            layer.weight[sorted(indices)], layer.bias[sorted(indices)] = 0, 0
        # depth adds a bias to its zeros; b must not read it
        second = [index - 6 for index in sorted(places["a"]) if index >= 6]
        by_hand.depth.bias[second] = -1
    for got, wanted in zip(outputs(pruned, data), outputs(by_hand, data), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


REFUSED = {
    "pixel shuffle by views": (
        between(lambda m, y: y.view(2, 4, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 4, 16, 16), 16, 4),
        "works along another axis",
    ),
    "every second channel": (between(lambda m, y: y[:, ::2], out=4), "takes every 2th channel"),
    "single channels": (between(lambda m, y: y[:, 0, None], out=1), "takes single channels"),
    "channels unbound": (between(lambda m, y: torch.stack(y.unbind(1), 1)), "takes single channels"),
    "rolled channels": (between(lambda m, y: y.roll(1, 1)), "shifts the channels"),
    "rolled flat": (between(lambda m, y: y.roll(1)), "along with other axes"),
    "padded with ones": (
        between(lambda m, y: F.pad(y, (0, 0, 0, 0, 1, 0), value=1.0), out=9), "pads along the channels",
    ),
    "a strided view": (
        between(lambda m, y: y.as_strided((2, 4, 8, 8), (512, 64, 8, 1), 64), out=4), "may reorder the channels",
    ),
    "spread over several": (
        lambda: Net(lambda m, x: m.out(m.a(x).expand(-1, 4, -1, -1)), a=conv(3, 1), out=conv(4, 2)), "broadcasts one",
    ),
    "unfold": (between(lambda m, y: y.unfold(2, 2, 2).sum(-1)), "cannot follow"),
    "gather": (between(lambda m, y: y[:, torch.tensor([1, 0, 3])], out=3), "cannot follow"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_stay_are_told(name):
    torch.manual_seed(0)
    build, reason = REFUSED[name]
    assert reason in refusal(build(), image(), "a")
