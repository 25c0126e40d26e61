"""What is known of channels: ids of sources, families of layers, joins, reasons to stay, rows that lose alike."""

from __future__ import annotations

import torch

from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.coupling import Coupling, Read, Source, joined_indices
from amct_ext.prune.grouping import classes_of


def producers(coupling: Coupling, *names: str, size: int = 4) -> list[torch.Tensor]:
    result = []
    for name in names:
        ids = coupling.ids_of(Source(f"{name}.weight", 0), size)
        coupling.produced_by(ids, Read(name, "Conv", ids))
        result.append(ids)
    return result


def test_a_source_has_the_same_ids_whenever_it_is_asked() -> None:
    coupling = Coupling()
    one = coupling.ids_of(Source("a.weight", 0), 3)
    assert one.tolist() == [1, 2, 3]
    assert coupling.ids_of(Source("a.weight", 1), 2).tolist() == [4, 5]
    assert coupling.ids_of(Source("a.weight", 0), 3) is one


def test_joined_channels_make_one_family() -> None:
    coupling = Coupling()
    a, b, c = producers(coupling, "a", "b", "c")
    coupling.join(a, b, "add")
    assert [f.root for f in coupling.families_in(torch.cat([b, c]))] == [coupling.families[0], coupling.families[2]]
    assert [p.name for p in coupling.families[1].root.producers] == ["a", "b"]
    coupling.join(b[:2], c[2:], "add")
    assert len({id(f.root) for f in coupling.families}) == 1
    assert classes_of(coupling).tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 9, 10, 1, 2]


def test_a_producer_is_named_once() -> None:
    coupling = Coupling()
    (a,) = producers(coupling, "a")
    coupling.produced_by(a, Read("a", "Conv", a))
    assert len(coupling.families) == 1


def test_channels_that_meet_none_stay_for_the_first_reason() -> None:
    coupling = Coupling()
    (a,) = producers(coupling, "a")
    coupling.join(a, torch.tensor([1, 0, 3, 0]), "/Add")
    assert [(ids.tolist(), reason) for ids, reason in coupling.frozen] == [
        ([2, 4, 0, 0], "/Add combines the channels with others that stay")
    ]
    assert not coupling.edges


def test_reads_go_to_the_families_they_read() -> None:
    coupling = Coupling()
    a, b = producers(coupling, "a", "b")
    both = Read("cat", "Concat", torch.cat([a, b]))
    coupling.read(both)
    coupling.read(Read("other", "Conv", torch.tensor([77])))
    assert all(family.reads == [both] for family in coupling.families)
    assert [read.name for read in coupling.unclaimed] == ["other"]


def test_one_row_needs_no_balance() -> None:
    coupling = Coupling()
    coupling.balance(torch.tensor([[1, 2]]), "a")
    coupling.balance(torch.tensor([[1], [2]]), "b")
    assert [where for _, where, _ in coupling.balanced] == ["b"]


def test_what_lies_at_one_index_becomes_one_channel() -> None:
    coupling = Coupling()
    producers(coupling, "a", size=6)
    ids = torch.arange(1, 7).reshape(1, 2, 3)
    assert joined_indices(ids, 2, 3, coupling, "flatten").tolist() == [1, 2, 3]
    assert classes_of(coupling).tolist() == [0, 1, 2, 3, 1, 2, 3]
    assert joined_indices(torch.ones(1, 1, dtype=torch.int64), 1, 4, coupling, "expand").tolist() == [1] * 4


def test_chains_of_edges_end_in_the_smallest_id() -> None:
    coupling = Coupling()
    producers(coupling, "a", size=9)
    for one in range(8, 0, -1):
        coupling.join(torch.tensor([one]), torch.tensor([one + 1]), "add")
    assert classes_of(coupling).tolist() == [0] + [1] * 9


def test_all_of_a_tensor_stays() -> None:
    coupling = Coupling()
    coupling.freeze_all((ChannelMap(torch.tensor([[1, 2]]), 1), ChannelMap(torch.tensor([[3]]), 1)), "an output")
    assert [ids.tolist() for ids, _ in coupling.frozen] == [[1, 2], [3]]
