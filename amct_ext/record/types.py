"""The record file: quantisation factors, removed channels and 2:4 masks of a compressed model.

Frozen dataclasses on one side, AMCT's text format on the other (text.py); nothing else touches that text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from amct_ext.common.files import write_if_changed
from amct_ext.errors import RecordError


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

    prune_index lists the removed channels in ascending order, already shifted by `begin`; empty means none.
    """

    name: str
    type: str
    begin: int
    end: int
    group: int | None = None
    prune_group: int | None = None
    prune_index: tuple[int, ...] = ()


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

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Record:
        """Read and check a record file. Errors: FileNotFoundError; RecordError with file and line."""
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{path}: not a record file (byte {error.start} is not UTF-8): give the text file that create wrote"
            ) from None
        return Record.loads(text, source=str(path))

    @staticmethod
    def loads(text: str, source: str = "<record>") -> Record:
        """Parse and check a record's text; `source` names it in messages. Errors: RecordError."""
        from amct_ext.record.text import loads

        return loads(text, source)

    def dumps(self) -> str:
        """The text of the file, byte for byte as AMCT prints it. Errors: RecordError if it is inconsistent."""
        from amct_ext.record.text import dumps

        return dumps(self)

    def write(self, path: str | os.PathLike[str]) -> bool:
        """Write the file atomically (mode 640), unless it already holds this record. Returns whether it wrote."""
        return write_if_changed(path, self.dumps())

    def quant_of(self, name: str) -> QuantRecord | None:
        """The factors of one layer, or None."""
        return next((item for item in self.quant if item.key == name), None)

    def sparse_of(self, name: str) -> SparseRecord | None:
        """The mask record of one layer, or None."""
        return next((item for item in self.sparse if item.name == name), None)
