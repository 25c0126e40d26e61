"""The integers and scales that a recorded LSTM or GRU is deployed with, checked against the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from amct_ext.common.layer_kinds import ONNX_GATES, layer_type
from amct_ext.errors import ExportError, RecordError
from amct_ext.export.factors import (
    DEAD,
    WEIGHT_BITS,
    LayerFactors,
    dead_channel_scales,
    dequantization_scales,
    scales_of,
    truncate,
    types_of,
)
from amct_ext.record.types import QuantRecord


@dataclass(frozen=True, eq=False)
class RnnFactors:
    """Both sides of a recurrent layer, gates in ONNX order: `inputs` (x and W) and `hidden` (h and R).

    Weights of a side have the shape (gates * hidden_size, columns); its `deq` holds one value per row, or one per gate.
    `scale_w` and `scale_r` are float32 of shape (rows,) or (gates,), in torch's order.
    """

    name: str
    kind: str  # 'LSTM' or 'GRU', as in ONNX
    hidden_size: int
    inputs: LayerFactors
    hidden: LayerFactors
    scale_w: np.ndarray
    scale_r: np.ndarray

    @property
    def state_count(self) -> int:
        return 2 if self.kind == "LSTM" else 1

    @property
    def has_bias(self) -> bool:
        return self.inputs.bias is not None

    def row_scale(self, side: LayerFactors) -> np.ndarray:
        """Weight scales of a side as a column, one per row."""
        return _per_row(self.scale_w if side is self.inputs else self.scale_r, len(side.weight))[:, None]

    def row_deq(self, side: LayerFactors) -> np.ndarray:
        """Dequantisation scales of a side, one per row."""
        return _per_row(side.deq, len(side.weight))


def rnn_factors(record: QuantRecord, module: nn.RNNBase) -> RnnFactors:
    """Quantise both weights of `module` with the factors of `record`.

    Errors: RecordRangeError (a factor out of range), RecordError (a missing factor, a length that does not fit),
    ExportError (several layers, two directions or a projection; a non-finite weight).
    """
    name = record.key
    if module.num_layers != 1 or module.bidirectional or module.proj_size:
        raise ExportError(f"layer {name!r}: only one layer, one direction and no projection can be exported quantised")
    if record.scale_h is None or record.offset_h is None or not record.scale_r:
        raise RecordError(f"layer {name!r}: recurrent layers need scale_h, offset_h, scale_r and offset_r too")
    kind = str(layer_type(module))
    recurrent = replace(
        record, scale_d=record.scale_h, offset_d=record.offset_h, scale_w=record.scale_r, offset_w=record.offset_r
    )
    tensors = {key: parameter.detach().to("cpu", torch.float32).numpy() for key, parameter in module.named_parameters()}
    inputs, hidden = (
        _side(factors, ONNX_GATES[kind], tensors[f"weight_{side}_l0"], tensors.get(f"bias_{side}_l0"))
        for factors, side in ((record, "ih"), (recurrent, "hh"))
    )
    scales = (np.asarray(record.scale_w, np.float32), np.asarray(record.scale_r, np.float32))
    return RnnFactors(name, kind, module.hidden_size, inputs, hidden, *scales)


def _side(record: QuantRecord, gates: Sequence[int], weight: np.ndarray, bias: np.ndarray | None) -> LayerFactors:
    act_type, wts_type = types_of(record)
    scale_d, scale_w = scales_of(record, act_type)
    rows = _onnx_order(gates, weight)
    if len(scale_w) not in (len(gates), len(rows)):
        raise RecordError(f"layer {record.key!r}: {len(scale_w)} weight scales, but it has {len(rows)} rows")
    if not np.isfinite(rows).all():
        raise ExportError(f"layer {record.key!r}: a weight holds NaN or Inf")
    deq = dequantization_scales(record.key, scale_d, scale_w)
    half = 1 << (WEIGHT_BITS[wts_type] - 1)
    steps = rows / _per_row(scale_w, len(rows))[:, None]
    integers = np.clip(np.rint(steps), -half, half - 1).astype(np.int8)
    ordered = None if bias is None else _onnx_order(gates, bias)
    deq = dead_channel_scales(deq, (abs(steps).reshape(len(deq), -1) <= DEAD).all(axis=1), ordered)
    return LayerFactors(
        name=record.key,
        scale_d=scale_d,
        offset_d=record.offset_d,
        act_type=act_type,
        weight_bits=WEIGHT_BITS[wts_type],
        weight=integers,
        bias=ordered,
        bias_integers=None if ordered is None else np.rint(ordered / _per_row(deq, len(rows))),
        deq=truncate(deq) if record.fakequant_precision_mode == "FORCE_FP16_QUANT" else deq,
        shift=(),
    )


def _onnx_order(gates: Sequence[int], array: np.ndarray) -> np.ndarray:
    blocks = np.split(array, len(gates))
    return np.concatenate([blocks[gate] for gate in gates])


def _per_row(scales: np.ndarray, rows: int) -> np.ndarray:
    return np.repeat(scales, rows // len(scales))
