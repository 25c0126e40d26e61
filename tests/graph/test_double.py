"""Models run in float64, whatever their code asks for."""

from __future__ import annotations

import torch
from torch import nn

from amct_ext.graph.double import InDouble


class Stubborn(nn.Module):
    """Makes float32 numbers of its own, and converts to them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        y = self.layer(x.float())
        steps = torch.arange(y.shape[-1], dtype=torch.float32) / 3
        y = y + steps.half()
        kept = torch.zeros(y.shape, dtype=torch.float32)
        kept[:, :2] = y[:, :2]
        return kept.mul_(torch.tensor(1 / 3)), y.to(torch.bfloat16)


def test_results_are_those_of_float64():
    torch.manual_seed(0)
    model, x = Stubborn().double(), torch.randn(1, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad(), InDouble():
        kept, other = model(x)
        y = nn.functional.conv2d(x, model.layer.weight, model.layer.bias) + torch.arange(4).double() / 3
    assert kept.dtype == other.dtype == torch.float64
    torch.testing.assert_close(other, y, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(kept[:, :2], y[:, :2] * torch.tensor(1 / 3).double(), rtol=1e-14, atol=1e-14)


def test_whole_numbers_and_float64_stay():
    with InDouble():
        assert (torch.ones(2, dtype=torch.int32) + 1).dtype == torch.int32
        assert torch.zeros(2).dtype == torch.float64
    assert torch.zeros(2).dtype == torch.float32
