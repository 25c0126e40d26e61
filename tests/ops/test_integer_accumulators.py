"""32-bit sums of products of codes, against exact arithmetic and the references."""

from __future__ import annotations

import pytest
import torch
from support.ops.integer_products import RANGES, convolutions, matrices
from support.ops.samples import layout, same_bits, scalars

from amct_ext import ops
from amct_ext.ops import integer_accumulators as accumulators


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize("clips", RANGES)
def test_sums_of_convolutions_are_exact(clips: tuple[float, float], extreme: bool, device: torch.device) -> None:
    for product in convolutions(clips, extreme, device):
        arguments = (*product.accumulated, *product.geometry)
        sums = ops.integer_conv2d_accumulators(*arguments)
        expected = accumulators.integer_conv2d_accumulators_reference(*arguments)
        assert torch.equal(sums.double(), product.total), product.geometry
        assert same_bits(sums, expected) and layout(sums) == layout(expected)


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
def test_sums_of_linear_layers_are_exact(extreme: bool, device: torch.device) -> None:
    for product in matrices(extreme, device):
        sums = ops.integer_linear_accumulators(*product.accumulated)
        assert torch.equal(sums.double(), product.total)
        assert same_bits(sums, accumulators.integer_linear_accumulators_reference(*product.accumulated))


def test_bad_input_is_refused(device: torch.device) -> None:
    scale, offset = scalars(0.1, -3.0, device=device)
    image = torch.zeros(1, 8, 2, 2, dtype=torch.uint8, device=device)
    packed, sums = ops.pack_weight(torch.randn(3, 8, 3, 3, device=device), scale.reshape(1))
    with pytest.raises(ValueError, match="integer_conv2d_accumulators: the filter is larger"):
        ops.integer_conv2d_accumulators(image, offset, packed, sums, (3, 3))
    with pytest.raises(TypeError, match="integer_linear_accumulators: codes must"):
        ops.integer_linear_accumulators(image.int(), offset, packed, sums)
