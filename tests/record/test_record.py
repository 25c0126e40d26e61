"""Record text <-> dataclasses: exact round trips, strict reading, atomic writing."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest

from amct_ext.common.files import write_if_changed
from amct_ext.errors import RecordError, RecordRangeError
from amct_ext.proto import text
from amct_ext.record.text import format_record, parse_record, read_record
from amct_ext.record.types import ChannelRecord, PruneNode, QuantRecord, Record, SparseRecord

QUANT = """record {
  key: "tail.fc"
  value {
    scale_d: 0.02
    offset_d: -3
    scale_w: 0.005
    offset_w: 0
    act_type: "INT8"
    wts_type: "INT8"
  }
}
"""
SPARSE = """prune_record {
  selective_prune {
    name: "tail.fc"
    attr { name: "mask_shape" type: INTS ints: 2 ints: 8 }
    attr { name: "selective_mask" type: INTS ints: 15045 }
  }
}
"""
CHANNEL = """prune_record {
  producer {
    name: "stem.conv"
    attr { name: "type" type: STRING s: "Conv" }
    attr { name: "begin" type: INT i: 0 }
    attr { name: "end" type: INT i: 8 }
    attr { name: "prune_index" type: INTS ints: 2 ints: 5 }
  }
  consumer {
    name: "head.mix"
    attr { name: "type" type: STRING s: "Conv" }
    attr { name: "begin" type: INT i: 4 }
    attr { name: "end" type: INT i: 12 }
    attr { name: "prune_index" type: INTS ints: 6 ints: 9 }
  }
}
"""


def test_the_format_in_full():
    record = parse_record(QUANT + CHANNEL + SPARSE)
    (quant,), (channel,), (sparse,) = record.quant, record.channel, record.sparse
    assert (quant.key, quant.offset_d, quant.offset_w) == ("tail.fc", -3, (0,))
    assert quant.scale_d == pytest.approx(0.02)
    assert channel.producers == (PruneNode("stem.conv", "Conv", 0, 8, prune_index=(2, 5)),)
    assert channel.consumers == (PruneNode("head.mix", "Conv", 4, 12, prune_index=(6, 9)),)
    assert sparse == SparseRecord("tail.fc", (2, 8), (15045,))
    assert parse_record(format_record(record)) == record
    assert format_record(record).startswith(QUANT)


def test_attributes_are_written_in_order():
    node = PruneNode("c", "Conv", 0, 4, group=2, prune_group=2, prune_index=(1, 3))
    text = format_record(Record(channel=(ChannelRecord((node,), ()),)))
    positions = [text.index(f'"{name}"') for name in ("type", "begin", "end", "group", "prune_group", "prune_index")]
    assert positions == sorted(positions)


def test_an_empty_record():
    assert parse_record("") == Record()
    assert format_record(Record()) == ""


def test_attributes_of_older_files_are_accepted():
    extra = '    attr { name: "prune_axis" type: INT i: 1 }\n    attr { name: "remain_channels" type: INTS ints: 3 }\n'
    first = '    attr { name: "begin" type: INT i: 0 }\n'
    assert parse_record(CHANNEL.replace(first, first + extra, 1)) == parse_record(CHANNEL)


def test_entries_without_factors_are_ignored():
    assert parse_record('record { key: "a" value { skip_fusion: true } }') == Record()


BAD = [
    (QUANT + CHANNEL[:-40], "truncated"),
    (QUANT[:-4], "truncated"),
    (QUANT.replace("scale_d", "scale_x"), "unknown field 'scale_x'.*did you mean 'scale_w'"),
    (QUANT.replace("0.02", '"much"'), ":4:.*scale_d"),
    (QUANT.replace("offset_d: -3", "offset_d: 1 offset_d: 2"), "offset_d"),
    (QUANT.replace('key: "tail.fc"', ""), ":1: .*without 'key'"),
    (QUANT.replace("    scale_w: 0.005\n", ""), ":1: layer 'tail.fc' lacks scale_w"),
    (QUANT.replace("    scale_d: 0.02\n", ""), "lacks scale_d"),
    (QUANT.replace("offset_w: 0", "offset_w: 0 offset_w: 0"), "1 scale_w and 2 offset_w"),
    (QUANT.replace('"INT8"', '"INT5"', 1), "act_type is 'INT5'"),
    (QUANT + QUANT, "layer 'tail.fc' has quantisation factors twice"),
    (QUANT.replace("scale_d: 0.02", "scale_d: 0.02 shift_bit: [1, 2]"), "2 shift_bit for 1 scale_w"),
    (QUANT.replace("scale_d: 0.02", "scale_d: 0.02 scale_r: 1"), "go in pairs"),
    (QUANT.replace("scale_d: 0.02", "scale_d: 0.02 tensor_balance_factor: 1"), "tensor_balance_factor"),
    ('record { key: "a" }', "layer 'a' has no 'value'"),
    ('record { key: "a" kv_cache_value { scale: 1 offset: 0 } }', "KV-cache"),
    (CHANNEL.replace("ints: 2 ints: 5", "ints: 2 ints: 8"), r":1: node 'stem.conv': prune_index 8 .*\[0, 8\)"),
    (QUANT + CHANNEL.replace("ints: 6 ints: 9", "ints: 3 ints: 9"), r":12: node 'head.mix': prune_index 3 .*\[4, 12\)"),
    (CHANNEL.replace("ints: 2 ints: 5", "ints: 5 ints: 2"), "has 2 after 5"),
    (CHANNEL.replace("ints: 2 ints: 5", "ints: 5 ints: 5"), "holds 5 twice"),
    (CHANNEL.replace("ints: 6 ints: 9", "ints: 6 ints: 8"), "'head.mix' and 'stem.conv'.*different channels"),
    (CHANNEL.replace("ints: 2 ints: 5", " ".join(f"ints: {i}" for i in range(8))), "different channels"),
    (CHANNEL.replace("i: 8", "i: 0"), "no range"),
    (CHANNEL.replace('    attr { name: "begin" type: INT i: 0 }\n', ""), "'stem.conv' has no attribute 'begin'"),
    (CHANNEL.replace("type: INT i: 8", "type: STRING s: '8'"), "'end' is STRING, must be INT"),
    (CHANNEL.replace("type: INT i: 8", "type: INT"), "'end' has no value"),
    (CHANNEL.replace("producer", "consumer", 1), "without a producer"),
    (CHANNEL.replace('name: "stem.conv"', ""), "without a name"),
    (CHANNEL + CHANNEL, "layer 'stem.conv' has removed channels"),
    (SPARSE.replace("ints: 15045", "ints: 15045 ints: 0"), ":1: 2:4 mask of 'tail.fc': 2 words .* must be 1"),
    (SPARSE.replace("ints: 15045", "ints: 16725"), None),
    (SPARSE.replace("ints: 15045", "ints: -1"), "bits are set behind"),
    (SPARSE.replace("ints: 2 ints: 8", "ints: 2 ints: 0"), "no shape"),
    (SPARSE.replace('"mask_shape"', '"shape"'), "has no mask_shape"),
    (SPARSE + SPARSE, "layer 'tail.fc' has 2:4 masks twice"),
    ("prune_record {}", "without a producer"),
]


@pytest.mark.parametrize(("text", "pattern"), BAD)
def test_strict_reading(tmp_path: Path, text: str, pattern: str | None):
    path = tmp_path / "record.txt"
    path.write_text(text)
    if pattern is None:
        assert read_record(path)
        return
    with pytest.raises(RecordError, match=pattern) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_a_truncated_file_never_passes_for_a_whole_one():
    text = format_record(parse_record(QUANT + CHANNEL + SPARSE))
    whole = {text.index("prune_record"), text.rindex("prune_record"), 0}
    for cut in range(len(text) - 1):
        if text[:cut].strip() == "" or cut in whole or cut + 1 in whole:
            continue
        with pytest.raises(RecordError):
            parse_record(text[:cut])


@pytest.mark.parametrize("value", ["0", "-0.5", "inf", "nan", "1e-60"])
@pytest.mark.parametrize("field", ["scale_d: 0.02", "scale_w: 0.005"])
def test_scales_out_of_range(field: str, value: str):
    with pytest.raises(RecordRangeError, match="must be finite and positive") as caught:
        parse_record(QUANT.replace(field, f"{field.split(':')[0]}: {value}"))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("old", "new"),
    [("offset_d: -3", "offset_d: 128"), ("offset_w: 0", "offset_w: 1"), ("offset_d: -3", "offset_d: -129")],
)
def test_offsets_out_of_range(old: str, new: str):
    with pytest.raises(RecordRangeError):
        parse_record(QUANT.replace(old, new))


def test_reading_looks_for_places_only_to_complain(monkeypatch: pytest.MonkeyPatch):
    """Finding a line scans the whole text: once per node, that made records of wide networks take minutes."""
    scans = []
    monkeypatch.setattr(text._Scanner, "__init__", lambda self, text: scans.append(text))
    parse_record(QUANT + CHANNEL + SPARSE)
    assert not scans


def test_sixteen_bit_activations_have_wide_offsets():
    text = QUANT.replace("offset_d: -3", "offset_d: -30000").replace('act_type: "INT8"', 'act_type: "INT16"')
    assert parse_record(text).quant[0].offset_d == -30000


@pytest.mark.parametrize(
    ("shift", "right"), [((0, 0), True), ((1, 16), True), ((0, 1), False), ((17, 1), False), ((1,), False)]
)
def test_shift_rule(shift: tuple[int, ...], right: bool):
    record = Record((QuantRecord("a", 0.5, 0, (0.5, 0.25), (0, 0), shift_bit=shift),))
    if right:
        assert parse_record(format_record(record)) == record
    else:
        with pytest.raises(RecordError, match="shift_bit"):
            format_record(record)


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path):
    good = QuantRecord("a", 0.5, 0, (0.5,), (0,))
    path = tmp_path / "record.txt"
    write_if_changed(path, format_record(Record((good,))))
    before = path.read_bytes()
    for bad in (dataclasses.replace(good, scale_d=float("nan")), dataclasses.replace(good, scale_w=())):
        with pytest.raises(RecordError):
            write_if_changed(path, format_record(Record((bad,))))
    assert path.read_bytes() == before


def test_reading_what_is_no_record(tmp_path: Path):
    path = tmp_path / "record.txt"
    path.write_bytes(b"PK\x03\x04\xff")
    with pytest.raises(RecordError, match="byte 4 is not UTF-8"):
        read_record(path)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "missing.txt")


def test_writing(tmp_path: Path):
    path = tmp_path / "new" / "deep" / "record.txt"
    record = Record((QuantRecord("schicht.ä", 0.5, 0, (0.5,), (0,)),))
    assert write_if_changed(path, format_record(record))
    assert read_record(path) == record
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
    inode = path.stat().st_ino
    assert not write_if_changed(path, format_record(record))
    assert path.stat().st_ino == inode
    assert write_if_changed(path, format_record(Record()))
    assert path.read_bytes() == b""
    assert os.listdir(path.parent) == ["record.txt"]


def test_golden_records_round_trip(golden: Path):
    files = sorted(golden.glob("*/record_*.txt"))
    assert files
    for path in files:
        assert format_record(read_record(path)).encode() == path.read_bytes(), path
