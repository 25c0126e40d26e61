"""Which channel each index of a tensor belongs to."""

from __future__ import annotations

import torch

from amct_ext.prune.channel_map import ChannelMap, from_vector, squeeze_constant_axes


def test_a_map_along_one_axis() -> None:
    channels = from_vector(torch.tensor([5, 6, 7]), 1, 4)
    assert channels.ids.shape == (1, 3, 1, 1) and channels.axis == 1 and channels.varying_axes == (1,)
    assert channels.expanded((2, 3, 4, 4)).shape == (2, 3, 4, 4)
    assert channels.rows().tolist() == [[5, 6, 7]]


def test_axes_in_front() -> None:
    channels = from_vector(torch.tensor([5, 6]), 0, 1)
    assert channels.with_leading_axes(0) is channels
    assert channels.with_leading_axes(2).ids.shape == (1, 1, 2) and channels.with_leading_axes(2).axis == 2


def test_rows_are_those_of_the_other_axes() -> None:
    heads = ChannelMap(torch.arange(1, 7).reshape(2, 1, 3), 2)
    assert heads.varying_axes == (0, 2)
    assert heads.rows().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert ChannelMap(heads.ids, 0).rows().tolist() == [[1, 4], [2, 5], [3, 6]]


def test_axes_without_change_are_narrowed() -> None:
    ids = torch.arange(1, 4).reshape(1, 3, 1)
    assert squeeze_constant_axes(ids.expand(2, 3, 4)).shape == (1, 3, 1)
    assert squeeze_constant_axes(ids.repeat(2, 1, 4)).shape == (1, 3, 1)
    assert squeeze_constant_axes(torch.arange(6).reshape(2, 3)).shape == (2, 3)
    assert squeeze_constant_axes(torch.zeros(2, 0, 3, dtype=torch.int64)).shape == (1, 0, 1)
