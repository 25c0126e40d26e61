"""The record of a compressed model: made of its present state, written, compared with it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from amct_ext import ops
from amct_ext.common.files import back_up, write_if_changed
from amct_ext.common.ranks import is_rank_zero
from amct_ext.config.plan import Plan
from amct_ext.errors import ModelError, RecordError, StaleStateError
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.recurrent.rnn import CompressedRNN
from amct_ext.layers.weight.quantizer import WeightQuantizer
from amct_ext.layers.weight.sparsity import Sparsity
from amct_ext.model_surgery.lookup import compressed_layers, compressed_modules, layers_by_created_name
from amct_ext.model_surgery.session import Session, StateVersions, present_pairs, raise_if_invalid, session_of
from amct_ext.record.text import format_record
from amct_ext.record.types import QuantRecord, Record, SparseRecord

logger = logging.getLogger("amct_ext")

_SMALLEST_FP16, _LARGEST_FP16 = 2.0**-14, 65504.0


def build_record(model: nn.Module, with_factors: bool = True) -> Record:
    """The record of the model as it is now: channel groups, 2:4 masks and, once calibrated, quantisation factors."""
    layers = layers_by_created_name(model).items()
    sparse = tuple(_sparse_record(name, layer) for name, (_, layer) in layers if layer.sparsity is not None)
    return Record(_factors(model) if with_factors else (), session_of(model).channel_records, sparse)


def start_record(model: nn.Module) -> None:
    """Write the record of a model just created, without factors; an older one that says something else is kept.

    Errors: OSError.
    """
    session = session_of(model)
    assert session.record_file is not None
    if is_rank_zero():
        content = format_record(build_record(model, with_factors=False)).encode()
        kept = back_up(session.record_file, content)
        if kept is not None:
            logger.warning(
                "%s holds the record of another run; it is kept as %s, and replaced by that of the model created now",
                session.record_file,
                kept,
            )
        write_if_changed(session.record_file, content)
        session.written_content = content


def write_record(model: nn.Module, record_file: str | None = None) -> None:
    """Write the record (on rank 0 of a distributed job).

    Errors: ModelError (a copy that has no file), InvalidDataError where activations held NaN/Inf.
    """
    session = session_of(model)
    raise_if_invalid(model)
    path = record_file or session.record_file
    if path is None:
        raise ModelError(
            "this model is a copy of a compressed model and has no record file of its own: give one, "
            "amct_ext.update_record(model, record_file)"
        )
    path = os.path.abspath(path)
    record = build_record(model)
    if is_rank_zero():
        content = format_record(record).encode()
        if path == session.record_file:
            _warn_of_other_writers(session, content)
        write_if_changed(path, content)
        session.written_content = content
    session.record_file = session.record_file or path
    if path == session.record_file:
        own = all(layer.ready for layer in compressed_modules(model))  # else the next evaluation has other factors
        complete = record.quant and own and _shifts_complete(model, session.plan)
        session.recorded_state = state_versions(model) if complete or not session.plan.quant_active else None


def _warn_of_other_writers(session: Session, content: bytes) -> None:
    """Say so where the record file is about to lose what somebody else wrote since this model's last write."""
    if session.written_content is None or session.record_file is None:
        return
    try:
        found = Path(session.record_file).read_bytes()
    except OSError:
        return
    if found not in (session.written_content, content):
        logger.warning(
            "%s: another model or process wrote to this record file; it is replaced by the factors of the model "
            "evaluated now. Give each model a record file of its own",
            session.record_file,
        )


def state_versions(model: nn.Module) -> StateVersions:
    """Identity and version of every tensor that recorded factors follow from; writes of forwards do not count."""
    tensors: list[torch.Tensor | None] = []
    clips: list[tuple[torch.Tensor, int]] = []
    for layer in compressed_modules(model):
        tensors += layer._parameters.values()
        for child in layer._modules.values():
            if isinstance(child, WeightQuantizer):
                tensors += child._parameters.values()  # a learned scale
            elif isinstance(child, Sparsity):
                tensors.append(child.mask)
            elif isinstance(child, ActivationQuantizer):
                clips += [(clip, child.clip_writes) for clip in child._parameters.values() if clip is not None]
        norm = layer.refs.batch_norm
        if norm is not None:
            tensors += norm._parameters.values()
            tensors.append(norm.running_var)
    present = [(t, 0) for t in tensors if t is not None] + clips
    return tuple([(id(t), 0 if t.is_inference() else t._version - writes) for t, writes in present])


def check_record(model: nn.Module, record: Record, source: str) -> None:
    """Raise StaleStateError, naming the layers, where recorded factors are not those of the model's present state."""
    present = {entry.key: entry for entry in _factors(model)}
    recorded = {entry.key: entry for entry in record.quant}
    wrong = [key for key in present if key not in recorded] + [key for key in recorded if key not in present]
    for key in present.keys() & recorded.keys():
        actual, written = present[key], recorded[key]
        same = (actual.offset_d, actual.offset_h) == (written.offset_d, written.offset_h)
        if not (same and _nearly_equal(_scales(actual), _scales(written))):
            wrong.append(key)
    if wrong:
        raise StaleStateError(
            f"{source}: the recorded factors of {len(wrong)} layer(s) are not those of the model "
            f"({', '.join(sorted(wrong)[:5])}{', ...' if len(wrong) > 5 else ''}); it was trained on, loaded or copied "
            f"since. Call amct_ext.update_record(model, {source!r}) before saving"
        )


def load_masks(model: nn.Module, record: Record, record_file: str) -> None:
    """Set the 2:4 masks from the record, for checkpoints without them. Errors: RecordError, all mismatches listed."""
    recorded = {entry.name: entry for entry in record.sparse}
    layers = {name: layer for name, layer in compressed_layers(model) if layer.sparsity is not None}
    problems = [f"no 2:4 entry for layer '{name}'" for name in layers if name not in recorded]
    problems += [
        f"2:4 entry for '{name}', which the configuration does not make sparse"
        for name in recorded
        if name not in layers
    ]
    problems += [
        f"mask_shape {recorded[name].mask_shape} of '{name}', whose weight is {tuple(layer.weight.shape)}"
        for name, layer in layers.items()
        if name in recorded and recorded[name].mask_shape != tuple(layer.weight.shape)
    ]
    if problems:
        raise RecordError(f"{record_file}: not the record of this model and configuration:\n  " + "\n  ".join(problems))
    for name, layer in layers.items():
        words = recorded[name].mask
        if words is not None:
            assert layer.sparsity is not None
            layer.sparsity.mask.copy_(ops.unpack_mask(torch.tensor(words, dtype=torch.int64), list(layer.weight.shape)))


def _factors(model: nn.Module) -> tuple[QuantRecord, ...]:
    """The factors of all quantised layers in execution order; none where there is a layer without any.

    Before the calibration they are those of the last evaluation, so that what it computed can be saved.
    """
    session = session_of(model)
    layers = {name: layer for name, (_, layer) in layers_by_created_name(model).items()}
    quantized = [name for name in session.order if name in layers and layers[name].weight_quant is not None]
    if not all(layers[name].recordable for name in quantized):
        return ()
    present_pairs(model)
    return tuple(_quant_record(name, layers[name], session.plan) for name in quantized)


def _shifts_complete(model: nn.Module, plan: Plan) -> bool:
    """Whether no layer waits for further evaluation batches; only of interest where shifts are recorded."""
    searches = [layer.search_n for _, layer in compressed_layers(model) if layer.search_n is not None]
    return not plan.write_shift_bit or not any(search.needs_data for search in searches)


def _sparse_record(name: str, layer: CompressedLayer) -> SparseRecord:
    assert layer.sparsity is not None
    mask = layer.sparsity.mask
    return SparseRecord(name=name, mask_shape=tuple(mask.shape), mask=tuple(ops.pack_mask(mask).tolist()))


def _quant_record(name: str, layer: CompressedLayer, plan: Plan) -> QuantRecord:
    quantizer, weight = layer.input_quantizer, layer.weight_quant
    assert quantizer is not None and weight is not None
    scale_d, offset_d = quantizer.factors()
    scale_w = tuple(layer.recorded_scale_w().float().tolist())
    entry = QuantRecord(
        key=name,
        scale_d=_round_to_fp16(scale_d) if plan.fp16 else scale_d,
        offset_d=offset_d,
        scale_w=scale_w,
        offset_w=(0,) * len(scale_w),
        act_type=f"INT{quantizer.num_bits}",
        wts_type=f"INT{weight.num_bits}",
        fakequant_precision_mode="FORCE_FP16_QUANT" if plan.fp16 else None,
    )
    if isinstance(layer, CompressedRNN):
        entry = _with_hidden(entry, layer, plan)
    if plan.write_shift_bit and layer.search_n is not None and layer.search_n.has_result:
        entry = replace(entry, shift_bit=tuple(layer.search_n.result(name, layer.deq_scale())))
    return entry


def _with_hidden(entry: QuantRecord, layer: CompressedRNN, plan: Plan) -> QuantRecord:
    assert layer.hidden_quant is not None
    scale_h, offset_h = layer.hidden_quant.factors()
    scale_r = tuple(layer.recorded_scale_r().float().tolist())
    return replace(
        entry,
        scale_h=_round_to_fp16(scale_h) if plan.fp16 else scale_h,
        offset_h=offset_h,
        scale_r=scale_r,
        offset_r=(0,) * len(scale_r),
    )


def _scales(entry: QuantRecord) -> tuple[float, ...]:
    hidden = () if entry.scale_h is None else (entry.scale_h,)
    return (entry.scale_d, *entry.scale_w, *hidden, *entry.scale_r)


def _round_to_fp16(value: float) -> float:
    """Round a scale to half precision; outside half's normal range its square root is rounded instead (AMCT's rule)."""
    if _SMALLEST_FP16 <= value <= _LARGEST_FP16:
        return float(torch.tensor(value).half().float())
    root = torch.tensor(math.sqrt(value)).half().float()
    return float(root * root)


def _nearly_equal(first: Sequence[float], second: Sequence[float]) -> bool:
    """Equal as float32 up to the last digits that another device's reduction order may change."""
    a, b = torch.tensor(first, dtype=torch.float32), torch.tensor(second, dtype=torch.float32)
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-5, atol=0.0))
