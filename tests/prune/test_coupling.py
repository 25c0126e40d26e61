"""What is known about channel ids: axes, coupled layers, joins, reasons to stay, rows that lose equally many."""

from __future__ import annotations

import torch

from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.coupling import AxisUse, Coupling, ParameterAxis, collapse_to_axis
from amct_ext.prune.grouping import channel_labels


def producers(coupling: Coupling, *names: str, size: int = 4) -> list[torch.Tensor]:
    result = []
    for name in names:
        ids = coupling.ids_of(ParameterAxis(f"{name}.weight", 0), size)
        coupling.add_producer(ids, AxisUse(name, "Conv", ids))
        result.append(ids)
    return result


def test_a_source_has_the_same_ids_whenever_it_is_asked() -> None:
    coupling = Coupling()
    one = coupling.ids_of(ParameterAxis("a.weight", 0), 3)
    assert one.tolist() == [1, 2, 3]
    assert coupling.ids_of(ParameterAxis("a.weight", 1), 2).tolist() == [4, 5]
    assert coupling.ids_of(ParameterAxis("a.weight", 0), 3) is one


def test_joined_channels_make_one_family() -> None:
    coupling = Coupling()
    a, b, c = producers(coupling, "a", "b", "c")
    coupling.join(a, b, "add")
    assert [f.root for f in coupling.coupled_layers_of(torch.cat([b, c]))] == [
        coupling.coupled_layers[0],
        coupling.coupled_layers[2],
    ]
    assert [p.name for p in coupling.coupled_layers[1].root.producers] == ["a", "b"]
    coupling.join(b[:2], c[2:], "add")
    assert len({id(f.root) for f in coupling.coupled_layers}) == 1
    assert channel_labels(coupling).tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 9, 10, 1, 2]


def test_a_producer_is_named_once() -> None:
    coupling = Coupling()
    (a,) = producers(coupling, "a")
    coupling.add_producer(a, AxisUse("a", "Conv", a))
    assert len(coupling.coupled_layers) == 1


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
    both = AxisUse("cat", "Concat", torch.cat([a, b]))
    coupling.add_consumer(both)
    coupling.add_consumer(AxisUse("other", "Conv", torch.tensor([77])))
    assert all(coupled.consumers == [both] for coupled in coupling.coupled_layers)
    assert [read.name for read in coupling.unclaimed] == ["other"]


def test_one_row_needs_no_balance() -> None:
    coupling = Coupling()
    coupling.require_equal_removal(torch.tensor([[1, 2]]), "a")
    coupling.require_equal_removal(torch.tensor([[1], [2]]), "b")
    assert [where for _, where, _ in coupling.equal_removals] == ["b"]


def test_what_lies_at_one_index_becomes_one_channel() -> None:
    coupling = Coupling()
    producers(coupling, "a", size=6)
    ids = torch.arange(1, 7).reshape(1, 2, 3)
    assert collapse_to_axis(ids, 2, 3, coupling, "flatten").tolist() == [1, 2, 3]
    assert channel_labels(coupling).tolist() == [0, 1, 2, 3, 1, 2, 3]
    assert collapse_to_axis(torch.ones(1, 1, dtype=torch.int64), 1, 4, coupling, "expand").tolist() == [1] * 4


def test_chains_of_edges_end_in_the_smallest_id() -> None:
    coupling = Coupling()
    producers(coupling, "a", size=9)
    for one in range(8, 0, -1):
        coupling.join(torch.tensor([one]), torch.tensor([one + 1]), "add")
    assert channel_labels(coupling).tolist() == [0] + [1] * 9


def test_all_of_a_tensor_stays() -> None:
    coupling = Coupling()
    coupling.freeze_all((ChannelMap(torch.tensor([[1, 2]]), 1), ChannelMap(torch.tensor([[3]]), 1)), "an output")
    assert [ids.tolist() for ids, _ in coupling.frozen] == [[1, 2], [3]]
