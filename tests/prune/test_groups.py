"""Groups of coupled channels: the indices of a channel, merging, equal blocks, layouts."""

from __future__ import annotations

import pytest

from amct_ext.prune.groups import ChannelGroup, Layout, Member, Segment


def group(count: int, name: str = "a") -> ChannelGroup:
    return ChannelGroup(count, [Member(name, "Conv")])


def test_a_channel_takes_adjacent_indices_from_where_the_member_begins() -> None:
    assert Member("a", "Conv").indices([0, 3]) == (0, 3)
    assert Member("f", "Gemm", begin=10, repeat=4).indices([1, 0]) == (14, 15, 16, 17, 10, 11, 12, 13)


def test_a_merged_group_hands_on_members_reasons_and_blocks() -> None:
    first, second, third = group(8, "a"), group(8, "b"), group(8, "c")
    second.in_blocks(2, "layer 'g'")
    third.freeze("it stays")
    second.absorb(third, "an addition")
    first.absorb(second, "an addition")
    first.absorb(third, "once more")
    assert third.root is second.root is first
    assert [member.name for member in first.producers] == ["a", "b", "c"]
    assert first.blocks == 2 and first.why_frozen == "it stays"
    third.read_by(Member("d", "Conv"))
    third.freeze("a later reason")
    assert [member.name for member in first.consumers] == ["d"]
    assert first.why_frozen == "it stays"


def test_groups_of_different_sizes_cannot_be_coupled() -> None:
    with pytest.raises(AssertionError, match="groups of 8 and 4 channels"):
        group(8).absorb(group(4), "an addition")


@pytest.mark.parametrize(
    ("demands", "blocks", "words"),
    [((2, 4), 4, ""), ((4, 2), 4, ""), ((3,), None, "cannot be divided"), ((4, 6), 4, "needs 6 equal blocks")],
)
def test_demands_for_equal_blocks(demands: tuple[int, ...], blocks: int | None, words: str) -> None:
    channels = group(8 if 6 not in demands else 12)
    for demand in demands:
        channels.in_blocks(demand, "layer 'g'")
    assert channels.blocks == blocks
    assert words in channels.why_frozen and bool(words) == bool(channels.why_frozen)


def test_a_record_and_its_group_say_the_same() -> None:
    channels = ChannelGroup(4, [Member("a", "Conv")], [Member("f", "Gemm", 2, 3)], blocks=2)
    record = channels.record([1, 3])
    assert record.producers[0].prune_index == (1, 3) and record.producers[0].prune_group == 2
    assert record.consumers[0].prune_index == (5, 6, 7, 11, 12, 13) and record.consumers[0].prune_group is None
    again = ChannelGroup.of(record)
    assert again.count == 4 and again.blocks == 2
    assert again.producers == channels.producers and again.consumers == channels.consumers


def test_layouts() -> None:
    first = group(3)
    layout = Layout(1, (Segment(first, 3), Segment(None, 2)))
    assert layout.size == 5 and layout.groups == [first]
    wider = layout.repeated(4).at(2)
    assert wider.axis == 2 and [begin for begin, _ in wider.begins()] == [0, 12] and wider.size == 20
    assert not layout.segments[0].same_layout(wider.segments[0])
    wider.freeze("read by index")
    assert first.why_frozen == "read by index"
