"""Groups of coupled channels: the indices of a channel, records, subgroups."""

from __future__ import annotations

import torch

from amct_ext.prune.groups import ChannelGroup, Member


def test_a_channel_takes_adjacent_indices_from_where_the_member_begins() -> None:
    assert Member("a", "Conv").indices([0, 3]) == (0, 3)
    assert Member("f", "Gemm", begin=10, repeat=4).indices([1, 0]) == (14, 15, 16, 17, 10, 11, 12, 13)


def test_places_in_another_order_are_listed() -> None:
    shuffled = Member("c", "Conv", index_pairs=((0, 0), (2, 1), (1, 2), (3, 3)), end=4)
    assert shuffled.indices([1, 2]) == (1, 2) and shuffled.indices([2]) == (1,)
    assert shuffled.per_channel(4) == 1
    values = torch.tensor([[1.0, 2, 3, 4]])
    assert shuffled.summed(values, 4).tolist() == [[1, 3, 2, 4]]


def test_values_of_all_indices_of_a_channel_are_summed() -> None:
    assert Member("f", "Gemm", begin=1, repeat=2).summed(torch.arange(6.0), 2).tolist() == [3, 7]


def test_a_record_and_its_group_say_the_same() -> None:
    subgroups = torch.tensor([0, 0, 1, 1])
    channels = ChannelGroup(4, [Member("a", "Conv")], [Member("f", "Gemm", 2, 3)], subgroups)
    record = channels.record([1, 3])
    assert record.producers[0].prune_index == (1, 3) and record.producers[0].prune_group == 2
    assert record.consumers[0].prune_index == (5, 6, 7, 11, 12, 13) and record.consumers[0].prune_group is None
    again = ChannelGroup.of(record)
    assert again.count == 4 and again.num_equal_subgroups == 2
    assert again.producers == channels.producers and again.consumers == channels.consumers


def test_only_equal_blocks_one_after_another_are_written() -> None:
    assert ChannelGroup(4, [], [], torch.tensor([0, 1, 0, 1])).num_equal_subgroups is None
    assert ChannelGroup(4, [], [], torch.tensor([0, 0, 0, 1])).num_equal_subgroups is None
    assert ChannelGroup(4, [], [], torch.tensor([0, 0, 0, 0])).num_equal_subgroups is None
