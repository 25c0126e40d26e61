"""What makes a record consistent in itself. Whether it fits a model is the business of who applies it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from amct_ext.errors import RecordError, RecordRangeError
from amct_ext.proto.text import Where
from amct_ext.record.types import ChannelRecord, PruneNode, QuantRecord, Record, SparseRecord

_DST_TYPES = ("INT8", "INT4")
_ACT_TYPES = ("INT8", "INT4", "INT16", "UNSET")
_WTS_TYPES = ("INT8", "INT4", "INT6", "INT7", "UNSET")
_MODES = ("DEFAULT", "FORCE_FP16_QUANT")
_FLOAT32_MIN, _FLOAT32_MAX = 1.401298464324817e-45, 3.4028234663852886e38


def check_quant(record: QuantRecord, where: Where) -> None:
    """Types, lengths and ranges of one layer's factors. Errors: RecordError, RecordRangeError."""
    label = f"layer '{record.key}'"
    if not record.key:
        raise RecordError(f"{where()}: factors without the name of their layer")
    for field, value, allowed in (
        ("dst_type", record.dst_type, (None, *_DST_TYPES)),
        ("act_type", record.act_type, _ACT_TYPES),
        ("wts_type", record.wts_type, _WTS_TYPES),
        ("fakequant_precision_mode", record.fakequant_precision_mode, (None, *_MODES)),
    ):
        if value not in allowed:
            names = ", ".join(str(item) for item in allowed if item is not None)
            raise RecordError(f"{where()}: {label}: {field} is '{value}', must be one of {names}")
    if not record.scale_w or len(record.scale_w) != len(record.offset_w):
        raise RecordError(
            f"{where()}: {label}: {len(record.scale_w)} scale_w and {len(record.offset_w)} offset_w; "
            "one of each per output channel, or one in all, is right"
        )
    if len(record.scale_r) != len(record.offset_r) or (record.scale_h is None) != (record.offset_h is None):
        raise RecordError(f"{where()}: {label}: scale_r / offset_r and scale_h / offset_h go in pairs")
    for field, scales in (
        ("scale_d", (record.scale_d,)),
        ("scale_w", record.scale_w),
        ("scale_h", () if record.scale_h is None else (record.scale_h,)),
        ("scale_r", record.scale_r),
    ):
        for index, scale in enumerate(scales):
            if not _FLOAT32_MIN <= scale <= _FLOAT32_MAX:  # false for NaN too
                raise RecordRangeError(f"{where()}: {label}: {field}[{index}] is {scale}, must be finite and positive")
    for field, offsets in (("offset_w", record.offset_w), ("offset_r", record.offset_r)):
        if any(offsets):
            raise RecordRangeError(f"{where()}: {label}: {field} must be 0, weights are quantised symmetrically")
    wide = record.dst_type is None and record.act_type == "INT16"
    low, high = (-32768, 32767) if wide else (-128, 127)
    for field, offset in (("offset_d", record.offset_d), ("offset_h", record.offset_h)):
        if offset is not None and not low <= offset <= high:
            raise RecordRangeError(f"{where()}: {label}: {field} is {offset}, must lie in [{low}, {high}]")
    _check_shift(record, where)


def _check_shift(record: QuantRecord, where: Where) -> None:
    shift = record.shift_bit
    if not shift:
        return
    label = f"layer '{record.key}'"
    if len(shift) != len(record.scale_w):
        raise RecordError(
            f"{where()}: {label}: {len(shift)} shift_bit for {len(record.scale_w)} scale_w, must be as many"
        )
    if any(shift) and not all(1 <= item <= 16 for item in shift):
        raise RecordRangeError(f"{where()}: {label}: shift_bit must be all 0, or each in 1..16; got {list(shift)[:8]}")


def check_channel(record: ChannelRecord, where: Where) -> None:
    """Ranges and indices of one channel group. Errors: RecordError."""
    if not record.producers:
        raise RecordError(f"{where()}: a prune_record without a producer: at least one layer must lose channels")
    for node in (*record.producers, *record.consumers):
        _check_node(node, where)
    first = record.producers[0]
    for node in (*record.producers, *record.consumers):
        same_width = not node.reordered and node.end - node.begin == first.end - first.begin
        if same_width and _relative(node) != _relative(first):
            raise RecordError(
                f"{where()}: '{node.name}' and '{first.name}' are one group but remove different channels "
                "(prune_index minus begin must agree)"
            )
    for node in record.producers:
        if node.prune_index and len(node.prune_index) == node.end - node.begin:
            raise RecordError(f"{where()}: producer '{node.name}': every channel is removed, at least one must stay")


def _check_node(node: PruneNode, where: Where) -> None:
    problem = _node_problem(node)
    if problem:
        label = f"node '{node.name}'" if node.name else "a node without a name"
        raise RecordError(f"{where()}: {label}{problem}")


def _node_problem(node: PruneNode) -> str:
    """What is wrong with one node, '' for nothing. Its line is looked up only for a message: that scans the file."""
    if not node.name or not node.type:
        return ": name and type must be given"
    if not 0 <= node.begin < node.end:
        return f": begin {node.begin} and end {node.end} are no range of channels"
    for field, value in (("group", node.group), ("prune_group", node.prune_group)):
        if value is not None and value < 1:
            return f": {field} is {value}, must be 1 or more"
    if node.axis is not None and node.axis < 0:
        return f": axis is {node.axis}, must be 0 or more"
    for index in node.prune_index:
        if not node.begin <= index < node.end:
            return f": prune_index {index} lies outside its channels [{node.begin}, {node.end})"
    for left, right in pairwise(node.prune_index):
        if left >= right:
            problem = f"holds {left} twice" if left == right else f"has {right} after {left}"
            return f": prune_index {problem}, must ascend"
    return ""


def _relative(node: PruneNode) -> tuple[int, ...]:
    return tuple(index - node.begin for index in node.prune_index)


def check_sparse(record: SparseRecord, where: Where) -> None:
    """Shape and length of one 2:4 mask. Errors: RecordError."""
    if not record.name:
        raise RecordError(f"{where()}: a 2:4 mask without the name of its layer")
    problem = _mask_problem(record)
    if problem:
        raise RecordError(f"{where()}: 2:4 mask of '{record.name}': {problem}")


def _mask_problem(record: SparseRecord) -> str:
    """What is wrong with one 2:4 mask, '' for nothing."""
    if not record.mask_shape or any(size < 1 for size in record.mask_shape):
        return f"mask_shape {list(record.mask_shape)} is no shape of a weight"
    if record.mask is None:
        return ""
    bits = math.prod(record.mask_shape)
    words = -(-bits // 64)
    if len(record.mask) != words:
        return f"{len(record.mask)} words for mask_shape {list(record.mask_shape)}, must be {words} (64 weights each)"
    # Bits stand in the order of the words' bytes, highest bit of a byte first; those after the last weight are padding.
    last = int.from_bytes(record.mask[-1].to_bytes(8, "little", signed=True), "big")
    if last & ((1 << (words * 64 - bits)) - 1):
        return f"bits are set behind the last of {bits} weights, so mask and mask_shape do not belong together"
    return ""


def check_unique(record: Record, source: str) -> None:
    """No layer is quantised, masked or pruned twice. Errors: RecordError."""
    for what, names in (
        ("quantisation factors", (item.key for item in record.quant)),
        ("2:4 masks", (item.name for item in record.sparse)),
    ):
        twice = _first_duplicate(names)
        if twice is not None:
            raise RecordError(f"{source}: layer '{twice}' has {what} twice; keep one entry")
    ranges: dict[str, list[range]] = {}
    for node in (node for item in record.channel for node in item.producers):
        channels, before = range(node.begin, node.end), ranges.setdefault(node.name, [])
        if any(channels.start < other.stop and other.start < channels.stop for other in before):
            raise RecordError(f"{source}: layer '{node.name}' has removed channels (producer) twice; keep one entry")
        before.append(channels)


def _first_duplicate(names: Iterable[str]) -> str | None:
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
