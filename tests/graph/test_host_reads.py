"""Reads of tensors on the host: which are reported, with which tensor and line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amct_ext.graph.host_reads import HostReads, caller


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda t: t.item(), "item"),
        (lambda t: t.tolist(), "tolist"),
        (lambda t: bool(t > 0), "__bool__"),
        (lambda t: int(t), "__int__"),
        (lambda t: float(t), "__float__"),
        (lambda t: range(t.long()), "__index__"),
        (lambda t: torch.equal(t, t), "equal"),
        (lambda t: t.numpy(), "numpy"),
    ],
)
def test_reads_are_reported(read, name):
    seen = []
    with HostReads(lambda tensor, how: seen.append((tensor, how))):
        read(torch.ones(()))
    assert [how for _, how in seen] == [name] and isinstance(seen[0][0], torch.Tensor)


def test_reads_inside_of_torch_are_not():
    seen = []
    with HostReads(lambda tensor, how: seen.append(how)):
        nn.Linear(3, 2)(torch.randn(4, 3)).relu().sum()
        torch.nn.utils.clip_grad_norm_([nn.Parameter(torch.ones(3))], 1.0)
    assert seen == []


def test_the_caller_is_the_innermost_line_outside_of_torch():
    found = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: found.append(caller()))
    layer(torch.ones(1, 2))
    file, _, line = found[0].rpartition(":")
    assert file == __file__ and line.isdigit()
