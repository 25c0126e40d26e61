"""The geometry of a convolution as the integer ops take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from amct_ext.layers.products.integer_ops import conv_geometry, conv_padding, output_is_channels_last

CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (1, 5), "padding": "valid", "dilation": (1, 2)},
]


@pytest.mark.parametrize("settings", CONVS, ids=str)
def test_the_output_size_is_torchs(settings: dict[str, Any]) -> None:
    conv = nn.Conv2d(2, 3, **settings)
    size = (9, 12)
    assert conv_geometry(conv).output_size(size) == list(conv(torch.zeros(1, 2, *size)).shape[2:])


def test_padding_whose_sides_differ_is_none() -> None:
    assert conv_padding(nn.Conv2d(2, 3, 3, padding=(1, 2))) == (1, 2)
    assert conv_padding(nn.Conv2d(2, 3, 3, padding="valid")) == (0, 0)
    assert conv_padding(nn.Conv2d(2, 3, (3, 4), padding="same")) is None


def test_a_kernel_that_does_not_fit_has_no_positive_size() -> None:
    assert min(conv_geometry(nn.Conv2d(2, 3, 5)).output_size((4, 9))) < 1


@pytest.mark.parametrize("last", [False, True])
def test_the_layout_is_that_of_the_float_convolution(last: bool) -> None:
    conv, x = nn.Conv2d(4, 3, 3), torch.randn(2, 4, 8, 8)
    x = x.to(memory_format=torch.channels_last) if last else x
    assert output_is_channels_last(conv, x) is last
    assert conv(x).is_contiguous(memory_format=torch.channels_last) is last
