"""The record file: quantisation factors, removed channels and 2:4 masks of a compressed model.

Frozen dataclasses; text.py reads and writes them as AMCT's text format.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantRecord:
    """Factors of one quantised layer: x_int = round(x / scale_d) + offset_d, w_int = round(w / scale_w).

    Floats are float32 values. scale_w holds one value, or one per output channel (with the BatchNorm factor in it);
    scale_h / scale_r are the hidden state's and the recurrence weight's factors of an LSTM or GRU. dst_type, shift_bit
    and fakequant_precision_mode are written only where set.
    """

    key: str
    scale_d: float
    offset_d: int
    scale_w: tuple[float, ...]
    offset_w: tuple[int, ...]
    act_type: str = "INT8"
    wts_type: str = "INT8"
    dst_type: str | None = None
    shift_bit: tuple[int, ...] = ()
    skip_fusion: bool = False
    fakequant_precision_mode: str | None = None
    scale_h: float | None = None
    offset_h: int | None = None
    scale_r: tuple[float, ...] = ()
    offset_r: tuple[int, ...] = ()


@dataclass(frozen=True)
class PruneNode:
    """A graph node of a channel group: its ONNX operator, and the group's channels begin..end in this node's own count.

    prune_index lists the removed channels in ascending order, already shifted by `begin`; empty means none. type
    'Initializer': a parameter or buffer that no layer of a known type holds; `name` is its own, `axis` is cut.
    reordered: the group's channels may lie in another order here than in the producers (behind a channel shuffle).
    """

    name: str
    type: str
    begin: int
    end: int
    group: int | None = None
    prune_group: int | None = None
    prune_index: tuple[int, ...] = ()
    axis: int | None = None
    reordered: bool = False


@dataclass(frozen=True)
class ChannelRecord:
    """One group of coupled channels: producers lose output channels, consumers read them."""

    producers: tuple[PruneNode, ...]
    consumers: tuple[PruneNode, ...]


@dataclass(frozen=True)
class SparseRecord:
    """The 2:4 mask of one layer: torch weight shape, and the mask packed into int64 words (None: not made yet)."""

    name: str
    mask_shape: tuple[int, ...]
    mask: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Record:
    """The whole file. Order is kept: of the quantised layers, of the channel groups, of the masks."""

    quant: tuple[QuantRecord, ...] = ()
    channel: tuple[ChannelRecord, ...] = ()
    sparse: tuple[SparseRecord, ...] = ()
