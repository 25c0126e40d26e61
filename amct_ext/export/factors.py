"""The integers and scales that a recorded layer is deployed with, checked against the layer they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from amct_ext.common.layer_kinds import TRANSPOSED_CONVS, kind_of, layer_type
from amct_ext.errors import ExportError, RecordError, RecordRangeError

if TYPE_CHECKING:
    from amct_ext.record.types import QuantRecord

ACTIVATION_BITS: Mapping[str, int] = {"INT4": 4, "INT8": 8, "INT16": 16}
WEIGHT_BITS: Mapping[str, int] = {"INT4": 4, "INT6": 6, "INT7": 7, "INT8": 8}
MAX_SHIFT = 16
# Weights that an evaluation takes for zeros lie below this many recorded steps: their scale is set to one (times the
# BatchNorm's factor), which they are too small to have.
DEAD = 128 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """Everything the two ONNX files say about one layer.

    `weight`: int8 codes in torch's layout. `bias`: float32, `bias_integers`: float in steps of `deq`, both of shape
    (output channels,). `deq`: float32 of shape (1,) or (output channels,), scale_d * scale_w; negative for channels
    whose mirrored weight has no codes, and free for those without a weight. `shift`: right shifts N, one per value of
    `deq`, empty where none are written.
    """

    name: str
    scale_d: np.float32
    offset_d: int
    act_type: str
    weight_bits: int
    weight: np.ndarray
    bias: np.ndarray | None
    bias_integers: np.ndarray | None
    deq: np.ndarray
    shift: tuple[int, ...]

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer of the activation."""
        half = 1 << (ACTIVATION_BITS[self.act_type] - 1)
        return -half, half - 1

    @property
    def input_key(self) -> tuple[float, int, str]:
        """Layers that read one tensor with equal keys share its quantisation."""
        return float(self.scale_d), self.offset_d, self.act_type


def layer_factors(
    record: QuantRecord, module: nn.Module, write_shift: bool, mirrored: np.ndarray | None = None
) -> LayerFactors:
    """Quantise `module` (BatchNorm already folded in) with the factors of `record`.

    `mirrored`: output channels whose weight the folded BatchNorm gave the other sign. An evaluation quantises before
    the BatchNorm: its codes are taken, mirrored where they have a mirror image within -128..127, else with a negative
    dequantisation scale (docs/differences.md, "Export"). Errors: RecordRangeError (a factor out of range), RecordError
    (a length that does not fit the layer), ExportError (a layer type that cannot be exported, a non-finite weight).
    """
    name = record.key
    if record.scale_h is not None:
        raise RecordError(f"layer {name!r} is a {type(module).__name__}, but its record is of a recurrent layer")
    kind = kind_of(module)
    if kind is None or not isinstance(module, (_ConvNd, nn.Linear)):
        raise ExportError(f"layer {name!r} is a {type(module).__name__}; only convolutions and Linear are quantised")
    act_type, wts_type = types_of(record)
    scale_d, scale_w = scales_of(record, act_type)
    weight = module.weight.detach().to("cpu", torch.float32).numpy()
    channels = int(getattr(module, kind.widths[1]))
    if len(scale_w) not in (1, channels):
        raise RecordError(f"layer {name!r}: {len(scale_w)} weight scales, but it has {channels} output channels")
    if not np.isfinite(weight).all():
        raise ExportError(f"layer {name!r}: the weight holds NaN or Inf")
    bias = None if module.bias is None else module.bias.detach().to("cpu", torch.float32).numpy()
    deq = dequantization_scales(name, scale_d, scale_w)
    shift = _shift(record, len(deq)) if write_shift else ()
    if bias is not None and len(bias) == len(deq):
        deq = _fit_bias(deq, bias, shift)
        scale_w = np.where(deq == scale_w * scale_d, scale_w, deq / scale_d)
    half = 1 << (WEIGHT_BITS[wts_type] - 1)
    signs = np.ones_like(deq)
    if mirrored is not None and len(mirrored) == len(deq):
        signs[mirrored] = -1
    steps = weight / _per_channel(scale_w * signs, module)
    integers = np.clip(np.rint(steps), -half, half - 1)
    kept = (signs < 0) & _any(integers == -half, module, len(deq))
    integers = (integers * _per_channel(np.where(kept, np.float32(1), signs), module)).astype(np.int8)
    deq = np.where(kept, -deq, deq)
    deq = dead_channel_scales(deq, ~_any(abs(steps) > DEAD, module, len(deq)), bias, shift)
    return LayerFactors(
        name=name,
        scale_d=scale_d,
        offset_d=record.offset_d,
        act_type=act_type,
        weight_bits=WEIGHT_BITS[wts_type],
        weight=integers,
        bias=bias,
        bias_integers=None if bias is None else np.rint(bias / deq),
        deq=truncate(deq) if record.fakequant_precision_mode == "FORCE_FP16_QUANT" else deq,
        shift=shift,
    )


def int32_bias(factors: LayerFactors) -> np.ndarray | None:
    """round(bias / deq) as INT32; ExportError naming the layer and channel when it does not fit."""
    if factors.bias_integers is None:
        return None
    limits = np.iinfo(np.int32)
    # compared in float64: float32 cannot hold the upper limit and would let 2^31 pass
    fits = (factors.bias_integers.astype(np.float64) >= limits.min) & (
        factors.bias_integers.astype(np.float64) <= limits.max
    )
    if not fits.all():
        channel = int(np.argmin(fits))
        raise ExportError(
            f"layer {factors.name!r}: the bias of channel {channel} is {factors.bias_integers[channel]:.6g} steps of "
            "scale_d * scale_w and does not fit INT32; the scales are too small for this bias"
        )
    return factors.bias_integers.astype(np.int32)


def types_of(record: QuantRecord) -> tuple[str, str]:
    """Activation and weight type; dst_type overrides both, UNSET means INT8."""
    act, wts = (record.act_type or "INT8", record.wts_type or "INT8")
    if record.dst_type:
        act = wts = record.dst_type
    act, wts = ("INT8" if text == "UNSET" else text for text in (act, wts))
    if act not in ACTIVATION_BITS or wts not in WEIGHT_BITS:
        raise RecordError(
            f"layer {record.key!r}: activation {act} and weight {wts} cannot be exported; "
            f"possible are {', '.join(ACTIVATION_BITS)} and {', '.join(WEIGHT_BITS)}"
        )
    return act, wts


def scales_of(record: QuantRecord, act_type: str) -> tuple[np.float32, np.ndarray]:
    """scale_d and scale_w as float32, checked. Errors: RecordError, RecordRangeError."""
    if record.scale_d is None or record.offset_d is None or not record.scale_w:
        raise RecordError(f"layer {record.key!r}: scale_d, offset_d and scale_w must all be recorded")
    scale_d, scale_w = np.float32(record.scale_d), np.asarray(record.scale_w, dtype=np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        usable = np.isfinite(scale_d) and scale_d > 0 and np.isfinite(np.float32(1) / scale_d)
    if not usable or not (np.isfinite(scale_w) & (scale_w > 0)).all():
        raise RecordRangeError(f"layer {record.key!r}: scales must be positive and finite")
    half = max(1 << (ACTIVATION_BITS[act_type] - 1), 128)
    if not -half <= record.offset_d < half:
        raise RecordRangeError(f"layer {record.key!r}: offset_d {record.offset_d} is outside {-half}..{half - 1}")
    if any(record.offset_w):
        raise RecordRangeError(f"layer {record.key!r}: weights are quantised symmetrically, offset_w must be 0")
    return scale_d, scale_w


def dequantization_scales(layer: str, scale_d: np.float32, scale_w: np.ndarray) -> np.ndarray:
    """scale_d * scale_w. RecordRangeError where that is no positive float32."""
    deq = scale_w * scale_d
    if not (np.isfinite(deq) & (deq > 0)).all():
        raise RecordRangeError(f"layer {layer!r}: scale_d * scale_w is not a positive float32")
    return deq


def dead_channel_scales(
    deq: np.ndarray, dead: np.ndarray, bias: np.ndarray | None, shift: Sequence[int] = ()
) -> np.ndarray:
    """`deq` with other scales where all weights are zero (`dead`): only the bias meets them, and stays as it is.

    `bias`: as many values per scale as there are channels to it. A power of two gives its largest 24 bits, which hold
    any float32, or 15 where a shift brings the accumulator to 16 bits.
    """
    if bias is None or not dead.any():
        return deq
    largest = np.abs(bias.reshape(len(deq), -1)).max(axis=1)
    own = _power_of_two_step(largest, np.asarray(shift) + 15 if shift else 24)
    return np.where(dead & (largest > 0) & (own >= np.finfo(np.float32).tiny), own, deq)


def _fit_bias(deq: np.ndarray, bias: np.ndarray, shift: Sequence[int]) -> np.ndarray:
    """`deq` with larger scales where the bias (one value to a scale) has too many steps for INT32.

    A BatchNorm with a small factor does that: what the weights add to such a bias is little, and less precise.
    """
    with np.errstate(over="ignore"):
        crowded = np.abs(bias / deq) > np.iinfo(np.int32).max
    return np.where(crowded, _power_of_two_step(bias, np.asarray(shift) + 15 if shift else 30), deq)


def _power_of_two_step(value: np.ndarray, bits: int | np.ndarray) -> np.ndarray:
    """The power of two in steps of which `value` has so many bits."""
    step: np.ndarray = np.ldexp(np.float32(1), np.frexp(value)[1] - bits).astype(np.float32)
    return step


def _per_channel(vector: np.ndarray, module: nn.Linear | _ConvNd) -> np.ndarray:
    """A vector shaped to meet the weight: output channels sit on axis 0, in ConvTranspose on (group, 1)."""
    rank = module.weight.dim()
    if len(vector) == 1:
        return vector.reshape([1] * rank)
    if not isinstance(module, _ConvNd) or layer_type(module) not in TRANSPOSED_CONVS:
        return vector.reshape([-1] + [1] * (rank - 1))
    # channel g * (Cout / groups) + j is column j of the rows that belong to group g
    rows = module.in_channels // module.groups
    per_row = np.repeat(vector.reshape(module.groups, -1), rows, axis=0)
    return per_row.reshape([module.in_channels, -1] + [1] * (rank - 2))


def _any(found: np.ndarray, module: nn.Linear | _ConvNd, scales: int) -> np.ndarray:
    """Whether anything was found in the part of the weight that each of the scales belongs to."""
    if scales > 1 and isinstance(module, _ConvNd) and layer_type(module) in TRANSPOSED_CONVS:
        parts = found.reshape(module.groups, module.in_channels // module.groups, scales // module.groups, -1)
        found = parts.swapaxes(1, 2)
    return np.asarray(found.reshape(scales, -1).any(axis=1))


def _shift(record: QuantRecord, channels: int) -> tuple[int, ...]:
    """The shift per scale, empty when there is none: 1..16 everywhere or 0 everywhere (searchN)."""
    shift = tuple(record.shift_bit)
    if not any(shift):
        return ()
    if len(shift) == 1:
        shift = shift * channels
    if len(shift) != channels or not all(1 <= bits <= MAX_SHIFT for bits in shift):
        raise RecordRangeError(
            f"layer {record.key!r}: shift_bit must hold {channels} values, all 0 or all within 1..{MAX_SHIFT}"
        )
    return shift


def truncate(deq: np.ndarray) -> np.ndarray:
    """Keep sign, exponent and the upper 10 bits of the mantissa (FORCE_FP16_QUANT)."""
    return (deq.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
