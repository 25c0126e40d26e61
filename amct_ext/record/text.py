"""Record <-> text: translation between the dataclasses of types.py and AMCT's messages. Rules: checks.py."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amct_ext.errors import RecordError
from amct_ext.proto import message_class
from amct_ext.proto.text import FieldLocations, MessageSyntaxError, Where, format_message, parse_message
from amct_ext.record.attributes import read_attribute, write_attribute
from amct_ext.record.checks import check_channel, check_quant, check_sparse, check_unique
from amct_ext.record.types import ChannelRecord, PruneNode, QuantRecord, Record, SparseRecord

_MESSAGE = "amct_ext.record.ScaleOffsetRecord"
_SCALARS = (
    "scale_d", "offset_d", "dst_type", "act_type", "wts_type", "fakequant_precision_mode", "scale_h", "offset_h",
)  # fmt: skip
_LISTS = ("scale_w", "offset_w", "shift_bit", "scale_r", "offset_r")
_FACTORS = ("scale_d", "offset_d", "scale_w", "offset_w", "shift_bit")


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read and check a record file. Errors: FileNotFoundError; RecordError with file and line."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: not a record file (byte {error.start} is not UTF-8): give the text file that create wrote"
        ) from None
    return parse_record(text, source=str(path))


def parse_record(text: str, source: str = "<record>") -> Record:
    """Parse and check a record's text; `source` names it in messages.

    Errors: RecordError (RecordRangeError for factors out of range), with file and line.
    """
    try:
        message = parse_message(_MESSAGE, text, source)
    except MessageSyntaxError as error:
        raise RecordError(
            f"{error.reason} (restore the record file from a copy, or make it again with create_*)"
        ) from None
    locations = FieldLocations(source, text)
    quant = []
    for index, item in enumerate(message.record):
        factors = _read_quant(item, lambda index=index: locations.at("record", index))  # type: ignore[misc]
        if factors is not None:
            quant.append(factors)
    channel, sparse = [], []
    for index, item in enumerate(message.prune_record):
        where: Where = lambda index=index: locations.at("prune_record", index)  # type: ignore[misc]  # noqa: E731
        if item.HasField("selective_prune"):
            sparse.append(_read_sparse(item, where))
        else:
            channel.append(_read_channel(item, where))
    record = Record(tuple(quant), tuple(channel), tuple(sparse))
    check_unique(record, source)
    return record


def format_record(record: Record) -> str:
    """The text of the file, byte for byte as AMCT prints it. Errors: RecordError where it could not be read back."""
    check_unique(record, "<record>")
    message = message_class(_MESSAGE)()
    for quant in record.quant:
        check_quant(quant, _nowhere)
        _write_quant(message.record.add(), quant)
    for channel in record.channel:
        _write_channel(message.prune_record.add(), channel)
    for sparse in record.sparse:
        check_sparse(sparse, _nowhere)
        _write_sparse(message.prune_record.add().selective_prune, sparse)
    return format_message(message)


def channel_messages(records: Iterable[ChannelRecord]) -> Any:
    """Channel records as AMCT's messages (a repeated field): what its plug-ins read and write attributes of."""
    message = message_class(_MESSAGE)()
    for record in records:
        _write_channel(message.prune_record.add(), record)
    return message.prune_record


def read_channel(message: Any) -> ChannelRecord:
    """The channel record that a message of ``channel_messages`` holds; attributes of others are left aside."""
    return _read_channel(message, _nowhere)


def _nowhere() -> str:
    return "<record>"


def _read_quant(item: Any, where: Where) -> QuantRecord | None:
    if not item.key:
        raise RecordError(f"{where()}: a 'record' entry without 'key': give the name of its layer")
    label = f"layer '{item.key}'"
    if item.HasField("kv_cache_value") or not item.HasField("value"):
        kind = "KV-cache factors, which no retrained layer has" if item.HasField("kv_cache_value") else "no 'value'"
        raise RecordError(f"{where()}: {label} has {kind}; make the record again with an evaluation forward")
    value = item.value
    if value.tensor_balance_factor:
        raise RecordError(
            f"{where()}: {label} has tensor_balance_factor, which belongs to post-training quantisation; remove it"
        )
    present = {name for name in _SCALARS if value.HasField(name)} | {name for name in _LISTS if getattr(value, name)}
    if not present & set(_FACTORS):
        return None  # an entry without any factor quantises nothing; AMCT ignores it too
    missing = [name for name in ("scale_d", "offset_d", "scale_w", "offset_w") if name not in present]
    if missing:
        raise RecordError(
            f"{where()}: {label} lacks {', '.join(missing)}; make the record again with an evaluation forward"
        )
    fields = {name: getattr(value, name) for name in _SCALARS if name in present}
    fields |= {name: tuple(getattr(value, name)) for name in _LISTS}
    record = QuantRecord(key=item.key, skip_fusion=value.skip_fusion, **fields)
    check_quant(record, where)
    return record


def _read_channel(item: Any, where: Where) -> ChannelRecord:
    record = ChannelRecord(
        tuple(_read_node(node, where) for node in item.producer),
        tuple(_read_node(node, where) for node in item.consumer),
    )
    check_channel(record, where)
    return record


def _read_sparse(item: Any, where: Where) -> SparseRecord:
    node = item.selective_prune
    if item.producer or item.consumer:
        raise RecordError(
            f"{where()}: one prune_record holds channels and a 2:4 mask (of '{node.name}'): give each its own entry"
        )
    shape = read_attribute(node, "mask_shape", "INTS", where)
    if shape is None:
        raise RecordError(f"{where()}: the 2:4 mask of '{node.name}' has no mask_shape: give the shape of the weight")
    mask = read_attribute(node, "selective_mask", "INTS", where)
    record = SparseRecord(node.name, tuple(shape), None if mask is None else tuple(mask))
    check_sparse(record, where)
    return record


def _read_node(node: Any, where: Where) -> PruneNode:
    values: dict[str, Any] = {}
    for name, kind in (("type", "STRING"), ("begin", "INT"), ("end", "INT"), ("group", "INT"), ("prune_group", "INT"),
                       ("axis", "INT")):  # fmt: skip
        value = read_attribute(node, name, kind, where)
        if value is None and name in ("type", "begin", "end"):
            raise RecordError(
                f"{where()}: node '{node.name}' has no attribute '{name}'; make the record again with create_*"
            )
        values[name] = value
    try:
        values["type"] = values["type"].decode("utf-8")
    except UnicodeDecodeError:
        raise RecordError(f"{where()}: node '{node.name}': its type is no UTF-8 text: give an ONNX operator") from None
    # anything else (prune_axis of older files, remain_channels, ...) carries nothing a restore needs
    reordered = bool(read_attribute(node, "reordered", "INT", where))
    return PruneNode(
        name=node.name,
        reordered=reordered,
        prune_index=tuple(read_attribute(node, "prune_index", "INTS", where) or ()),
        **values,
    )


def _write_quant(item: Any, record: QuantRecord) -> None:
    item.key = record.key
    for name in _SCALARS:
        value = getattr(record, name)
        if value is not None:
            setattr(item.value, name, value)
    for name in _LISTS:
        getattr(item.value, name).extend(getattr(record, name))
    if record.skip_fusion:
        item.value.skip_fusion = True


def _write_channel(item: Any, record: ChannelRecord) -> None:
    check_channel(record, _nowhere)
    for node in record.producers:
        _write_node(item.producer.add(), node)
    for node in record.consumers:
        _write_node(item.consumer.add(), node)


def _write_node(item: Any, node: PruneNode) -> None:
    item.name = node.name
    write_attribute(item, "type", "STRING", node.type.encode("utf-8"))
    for name in ("begin", "end", "group", "prune_group", "axis"):
        value = getattr(node, name)
        if value is not None:
            write_attribute(item, name, "INT", value)
    if node.reordered:
        write_attribute(item, "reordered", "INT", 1)
    if node.prune_index:
        write_attribute(item, "prune_index", "INTS", node.prune_index)


def _write_sparse(item: Any, record: SparseRecord) -> None:
    item.name = record.name
    write_attribute(item, "mask_shape", "INTS", record.mask_shape)
    if record.mask is not None:
        write_attribute(item, "selective_mask", "INTS", record.mask)
