"""Any consistent record survives its text, and the text is protobuf's own."""

from __future__ import annotations

from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from amct_ext.proto import message_class
from amct_ext.record.text import format_record, parse_record
from amct_ext.record.types import ChannelRecord, PruneNode, QuantRecord, Record, SparseRecord

names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
scales = st.floats(2.0**-149, 2.0**127, width=32)


@st.composite
def quant_records(draw: st.DrawFn) -> QuantRecord:
    count = draw(st.integers(1, 5))
    rows = draw(st.integers(0, 3))
    shift = st.one_of(
        st.just(()),
        st.just((0,) * count),
        st.lists(st.integers(1, 16), min_size=count, max_size=count).map(tuple),
    )
    return QuantRecord(
        key=draw(names),
        scale_d=draw(scales),
        offset_d=draw(st.integers(-128, 127)),
        scale_w=tuple(draw(st.lists(scales, min_size=count, max_size=count))),
        offset_w=(0,) * count,
        act_type=draw(st.sampled_from(["INT8", "INT16"])),
        wts_type=draw(st.sampled_from(["INT8", "INT4"])),
        dst_type=draw(st.sampled_from([None, "INT8", "INT4"])),
        shift_bit=draw(shift),
        skip_fusion=draw(st.booleans()),
        fakequant_precision_mode=draw(st.sampled_from([None, "FORCE_FP16_QUANT"])),
        scale_h=draw(scales) if rows else None,
        offset_h=draw(st.integers(-128, 127)) if rows else None,
        scale_r=tuple(draw(st.lists(scales, min_size=rows, max_size=rows))),
        offset_r=(0,) * rows,
    )


@st.composite
def channel_records(draw: st.DrawFn) -> ChannelRecord:
    width = draw(st.integers(2, 40))
    removed = sorted(draw(st.sets(st.integers(0, width - 1), max_size=width - 1)))

    def node(begin: int) -> PruneNode:
        return PruneNode(
            draw(names),
            draw(st.sampled_from(["Conv", "Gemm", "BatchNormalization", "Add", "Concat"])),
            begin,
            begin + width,
            draw(st.sampled_from([None, 4])),
            draw(st.sampled_from([None, 2])),
            tuple(index + begin for index in removed),
        )

    consumers = draw(st.lists(st.integers(0, 9), max_size=3))
    return ChannelRecord((node(0),), tuple(node(begin) for begin in consumers))


@st.composite
def sparse_records(draw: st.DrawFn) -> SparseRecord:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    bits = 1
    for size in shape:
        bits *= size
    words = -(-bits // 64)
    raw = draw(st.binary(min_size=words * 8, max_size=words * 8))
    kept = int.from_bytes(raw, "big") >> (words * 64 - bits) << (words * 64 - bits)
    data = kept.to_bytes(words * 8, "big")
    mask = tuple(int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, words * 8, 8))
    return SparseRecord(draw(names), shape, draw(st.sampled_from([None, mask])))


records = st.builds(
    Record,
    st.lists(quant_records(), max_size=3, unique_by=lambda item: item.key).map(tuple),
    st.lists(channel_records(), max_size=3, unique_by=lambda item: item.producers[0].name).map(tuple),
    st.lists(sparse_records(), max_size=3, unique_by=lambda item: item.name).map(tuple),
)


@given(records)
def test_round_trip(record: Record):
    text = format_record(record)
    assert parse_record(text) == record
    assert format_record(parse_record(text)) == text


@given(records)
def test_the_text_is_what_protobuf_prints(record: Record):
    message = text_format.Parse(format_record(record), message_class("amct_ext.record.ScaleOffsetRecord")())
    assert text_format.MessageToString(message, as_utf8=True) == format_record(record)
