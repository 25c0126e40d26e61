"""Products of 8-bit codes with their exact sums, for the tests of the integer ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from support.ops.samples import scalars
from torch import Tensor

from amct_ext import ops

# Offsets at both ends and between them.
RANGES = ((1.0, 0.0), (0.0, -1.0), (0.9, -1.3))
GEOMETRIES = list(
    itertools.product(((1, 1), (3, 3), (5, 2)), ((1, 1), (2, 1), (3, 2)), ((0, 0), (1, 1), (2, 3)), ((1, 1), (2, 3)))
)


class Product(NamedTuple):
    """Operands as `ulq_quantize` and `pack_weight` give them, and the sums as float64, which holds them."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    packed: Tensor
    sums: Tensor
    w_scale: Tensor
    bias: Tensor | None
    total: Tensor
    geometry: tuple[tuple[int, int], ...] = ()  # kernel, stride, padding, dilation

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self[:7]

    @property
    def accumulated(self) -> tuple[Tensor, ...]:
        """What the accumulators alone take."""
        return self.codes, self.offset, self.packed, self.sums


def exact(total: Tensor, scale: Tensor, w_scale: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """Integer sums (as float64, which holds them) times scales plus bias, rounded to float32 once."""
    shape = [1] * total.dim()
    shape[axis] = -1
    y = total * (scale.double() * w_scale.double()).view(shape)
    return (y if bias is None else y + bias.double().view(shape)).float()


def weight(outputs: int, inputs: int, size: tuple[int, ...], extreme: bool, device: torch.device) -> Tensor:
    """Codes as floats; extreme: each output has the largest or the smallest code throughout."""
    if extreme:
        return torch.where(torch.rand(outputs, 1, *[1] * len(size), device=device) < 0.5, -128.0, 127.0).expand(
            outputs, inputs, *size
        )
    return torch.randint(-128, 128, (outputs, inputs, *size), device=device).float()


def convolutions(clips: tuple[float, float], extreme: bool, device: torch.device) -> Iterator[Product]:
    """Every geometry, with odd numbers of channels."""
    channels = itertools.cycle(((3, 5), (1, 1), (4, 16), (17, 70), (64, 33), (6, 129)))
    for kernel, stride, padding, dilation in GEOMETRIES:
        inputs, outputs = next(channels)
        x = torch.randn(2, inputs, 11, 13, device=device)
        if extreme:
            x = torch.where(torch.rand(2, 1, 1, 1, device=device) < 0.5, 9.0, -9.0).expand_as(x)
        codes, scale, offset, *_ = ops.ulq_quantize(x, *scalars(*clips, math.nan, math.nan, device=device))
        w = weight(outputs, inputs, kernel, extreme, device)
        w_scale = torch.rand(outputs, device=device) + 0.001
        bias = torch.randn(outputs, device=device) if stride[0] != 2 else None
        packed, sums = ops.pack_weight(w * w_scale.view(-1, 1, 1, 1), w_scale)
        total = F.conv2d(codes.double() - 128 - offset.double(), w.double(), None, stride, padding, dilation)
        assert total.abs().max() < 2**31
        geometry = (kernel, stride, padding, dilation)
        yield Product(codes, scale, offset, packed, sums, w_scale, bias, total, geometry)


def matrices(extreme: bool, device: torch.device) -> Iterator[Product]:
    """Linear layers up to the longest sum that 32 bits hold."""
    shapes = (((1,), 1, 1), ((5,), 7, 3), ((2, 3), 64, 65), ((97,), 130, 200), ((8,), 20000, 20), ((7, 1), 65793, 2))
    for (rows, inputs, outputs), clips in itertools.product(shapes, RANGES):
        x = torch.randn(*rows, inputs, device=device)
        if extreme:
            x = torch.where(torch.rand(*rows, 1, device=device) < 0.5, 9.0, -9.0).expand_as(x)
        codes, scale, offset, *_ = ops.ulq_quantize(x, *scalars(*clips, math.nan, math.nan, device=device))
        w, w_scale = weight(outputs, inputs, (), extreme, device), torch.full((1,), 0.0173, device=device)
        packed, sums = ops.pack_weight(w * w_scale, w_scale)
        total = F.linear(codes.double() - 128 - offset.double(), w.double())
        assert total.abs().max() < 2**31
        bias = torch.randn(outputs, device=device) if outputs % 2 else None
        yield Product(codes, scale, offset, packed, sums, w_scale, bias, total)
