"""Channel records of a file against a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.checks.planned_channels import plain, planned
from support.models.net_of_function import conv, image
from torch import nn

from amct_ext.errors import RecordError
from amct_ext.prune.channels import apply_channels
from amct_ext.record.types import ChannelRecord, PruneNode


def change(record: ChannelRecord, side: str, position: int, **fields) -> ChannelRecord:
    nodes = list(getattr(record, side))
    nodes[position] = dataclasses.replace(nodes[position], **fields)
    return dataclasses.replace(record, **{side: tuple(nodes)})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: change(r, "producers", 0, name="conv9"), "no layer conv9"),
        (lambda r: change(r, "consumers", 0, name="conv9"), "no layer conv9"),
        (lambda r: change(r, "producers", 0, end=16), r"8 channels.*0\.\.16"),
        (lambda r: change(r, "producers", 0, type="Gemm"), "type of 0 is Gemm, but it is a Conv2d"),
        (lambda r: change(r, "producers", 0, name="1", type="BatchNormalization"), "only Conv1d, .* can be producers"),
        (lambda r: change(r, "producers", 0, prune_index=(8,)), "8 of 0 lies outside 0..7"),
        (lambda r: change(r, "producers", 0, prune_index=tuple(range(8))), "all its channels"),
        (lambda r: change(r, "consumers", 1, prune_index=(1,)), "that does not fit together"),
        (lambda r: change(r, "consumers", 1, begin=4, end=12), r"8 channels.*4\.\.12"),
        (lambda r: change(r, "consumers", 1, prune_index=(1, 1, 2)), "twice"),
        (lambda r: dataclasses.replace(r, producers=()), "no producer"),
        (lambda r: dataclasses.replace(r, consumers=r.consumers[:1]), "does not fit the model"),
        (lambda r: dataclasses.replace(r, producers=r.producers + r.producers), None),
    ],
)
def test_a_record_that_does_not_fit_is_an_error_and_changes_nothing(broken, message):
    net = plain()
    found, (first, second) = planned(net, image())
    before = dict(net.named_parameters())
    if message is None:
        records = (first, first)
        message = "producer of prune_record 1 already"
    else:
        records = (second, broken(first))
    with pytest.raises(RecordError, match=rf"prune_record 2.*{message}"):
        apply_channels(net, found, records, image(), strict=True)
    assert all(value is before[name] for name, value in net.named_parameters())
    assert (net[0].out_channels, net[1].num_features, net[3].in_channels) == (8, 8, 8)


def test_blocks_of_a_file_must_be_equal():
    net = nn.Sequential(conv(3, 8), conv(8, 8, groups=4), conv(8, 2)).eval()
    found, (first, _) = planned(net, image(), ratio=0.5)
    uneven = ChannelRecord(
        tuple(dataclasses.replace(node, prune_index=(0, 1, 2, 4)) for node in first.producers),
        tuple(dataclasses.replace(node, prune_index=(0, 1, 2, 4)) for node in first.consumers),
    )
    with pytest.raises(RecordError, match="4 groups of 1 must lose equally many"):
        apply_channels(net, found, (uneven,), image(), strict=True)


def test_unknown_adds_and_concats_are_ignored():
    net = plain()
    found, records = planned(net, image())
    node = PruneNode("Add_8", "Add", 0, 8, prune_index=records[0].producers[0].prune_index)
    odd = dataclasses.replace(records[0], consumers=(node, *records[0].consumers))
    assert apply_channels(net, found, (odd, records[1]), image(), strict=True) == (odd, records[1])
    assert net[0].out_channels == 5


def test_a_record_replays_to_the_same_model():
    first, second = plain(), plain()
    second.load_state_dict(first.state_dict())
    found, records = planned(first, image())
    apply_channels(first, found, records, image())
    apply_channels(second, planned(second, image())[0], records, image(), strict=True)
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
