"""What a compressed model knows about itself, and the hook that records its factors when it is evaluated."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_ext import ops
from amct_ext.config.plan import Plan
from amct_ext.errors import ModelError, StaleStateError
from amct_ext.flow.surgery import compressed_layers
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.pending import Running, plain
from amct_ext.layers.rnn import CompressedRNN
from amct_ext.ranks import average_, first_rank, several_ranks
from amct_ext.reasons import LayerReasons
from amct_ext.record.types import ChannelRecord, QuantRecord, Record, SparseRecord

_ATTRIBUTE = "amct_ext_session"
_SMALLEST_FP16, _LARGEST_FP16 = 2.0**-14, 65504.0


@dataclass
class Session:
    """Facts of one compressed model; plain data, copied and pickled with the model."""

    plan: Plan
    record_file: str
    channel: tuple[ChannelRecord, ...] = ()
    conv_bn: dict[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()  # compressed layers in execution order
    reasons: dict[str, LayerReasons] = field(default_factory=dict)  # why layers are left alone
    export_note: str = ""  # what create found out about saving this model
    dirty: bool = True  # the record does not hold the factors of the present parameters
    calibrating: bool = True  # forwards may still find clip ranges, each rank its own
    running: Running = field(default_factory=Running)


def attach(model: nn.Module, session: Session) -> None:
    """Give the model its session and the hooks that keep the record file up to date."""
    setattr(model, _ATTRIBUTE, session)
    # Ranks agree on our buffers by construction, or keep their own (the flag for NaN): nothing to broadcast.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own_buffers(model))
    model.register_forward_pre_hook(_before_forward)
    model.register_forward_hook(_after_forward)
    model.register_forward_hook(_leave_forward, always_call=True)
    model.register_state_dict_pre_hook(_before_state_dict)
    model.register_load_state_dict_post_hook(_after_load)


def detach(model: nn.Module) -> None:
    """Take session and hooks off again: for a copy that is no compressed model any more."""
    for name in (_ATTRIBUTE, "_ddp_params_and_buffers_to_ignore"):
        vars(model).pop(name, None)
    ours = (_before_forward, _after_forward, _leave_forward, _before_state_dict, _after_load)
    every = (
        model._forward_pre_hooks,
        model._forward_hooks,
        model._state_dict_pre_hooks,
        model._load_state_dict_post_hooks,
    )
    for hooks in every:
        for key in [key for key, hook in hooks.items() if hook in ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def session_of(model: nn.Module) -> Session:
    """The session of a compressed model. Errors: ModelError (a RuntimeError) for any other model."""
    session = getattr(model, _ATTRIBUTE, None)
    if session is None:
        raise ModelError(
            f"{type(model).__name__} was not made by create_* or restore_* of amct_ext; pass what they returned"
        )
    return session


def build_record(model: nn.Module, with_factors: bool = True) -> Record:
    """The record of the model as it is now: channel groups, 2:4 masks and, once calibrated, quantisation factors."""
    layers = compressed_layers(model)
    sparse = tuple(_sparse_record(name, layer) for name, layer in layers if layer.sparsity is not None)
    return Record(_factors(model) if with_factors else (), session_of(model).channel, sparse)


def link_norms(model: nn.Module) -> None:
    """Point convolutions to the BatchNorm modules that follow them now; they may be exchanged (SyncBatchNorm)."""
    layers = dict(compressed_layers(model))
    for conv, norm in session_of(model).conv_bn.items():
        layers[conv].links.norm = model.get_submodule(norm)


def write_record(model: nn.Module, record_file: str | None = None, with_factors: bool = True) -> None:
    """Write the record (on rank 0 of a distributed job). Errors: InvalidDataError where activations held NaN/Inf."""
    session = session_of(model)
    raise_if_invalid(model)
    record = build_record(model, with_factors)
    if first_rank():
        record.write(record_file or session.record_file)
    if record_file is None or os.path.abspath(record_file) == session.record_file:
        session.dirty = session.plan.quant_active and not (record.quant and _shifts_complete(model, session.plan))


def check_record(model: nn.Module, record: Record, source: str) -> None:
    """Raise StaleStateError, naming the layers, where recorded factors are not those of the model's present state."""
    present = {entry.key: entry for entry in _factors(model)}
    recorded = {entry.key: entry for entry in record.quant}
    wrong = [key for key in present if key not in recorded] + [key for key in recorded if key not in present]
    for key in present.keys() & recorded.keys():
        ours, theirs = present[key], recorded[key]
        same = (ours.offset_d, ours.offset_h) == (theirs.offset_d, theirs.offset_h)
        if not (same and _close(_scales(ours), _scales(theirs))):
            wrong.append(key)
    if wrong:
        raise StaleStateError(
            f"{source}: the recorded factors of {len(wrong)} layer(s) are not those of the model "
            f"({', '.join(sorted(wrong)[:5])}{', ...' if len(wrong) > 5 else ''}); it was trained on or loaded since. "
            "Run one forward in eval mode, or call amct_ext.update_record(model), before saving"
        )


def raise_if_invalid(model: nn.Module) -> None:
    """Raise InvalidDataError for a layer whose input held NaN/Inf since the last check."""
    quantisers = [quantiser for _, layer in compressed_layers(model) for quantiser in layer.own_quantizers]
    if quantisers and bool(torch.stack([q.invalid for q in quantisers]).any()):
        for quantiser in quantisers:
            quantiser.raise_if_invalid()


def _factors(model: nn.Module) -> tuple[QuantRecord, ...]:
    """The factors of all quantised layers in execution order; none before every calibration is finished."""
    session = session_of(model)
    layers = dict(compressed_layers(model))
    quantised = [name for name in session.order if layers[name].weight_quant is not None]
    if not all(_calibrated(layers[name]) for name in quantised):
        return ()
    link_norms(model)
    return tuple(_quant_record(name, layers[name], session.plan) for name in quantised)


def _shifts_complete(model: nn.Module, plan: Plan) -> bool:
    """Whether no layer waits for further evaluation batches; only of interest where shifts are recorded."""
    searches = [layer.search_n for _, layer in compressed_layers(model) if layer.search_n is not None]
    return not plan.write_shift_bit or not any(search.wants_data for search in searches)


def own_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that compressed layers add to the float model."""
    children = (
        (f"{name}.{own}", getattr(layer, own)) for name, layer in compressed_layers(model) for own in layer.own_children
    )
    return [f"{prefix}.{key}" for prefix, child in children if child is not None for key, _ in child.named_buffers()]


def share_ranges(model: nn.Module) -> None:
    """Give every rank the mean of the clips that the ranks found on data of their own, by one collective."""
    quantisers = [quantiser for _, layer in compressed_layers(model) for quantiser in layer.own_quantizers]
    average_([clip for quantiser in quantisers for clip in quantiser.found_range()])
    session_of(model).calibrating = not all(quantiser.calibrated for quantiser in quantisers)


def _before_forward(model: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        getattr(model, _ATTRIBUTE).running.depth += 1


def _leave_forward(model: nn.Module, args: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    running = getattr(model, _ATTRIBUTE).running
    running.depth = max(running.depth - 1, 0)
    values = plain(output)
    return None if values is output else values


def _after_forward(model: nn.Module, args: Any, output: Any) -> None:
    session = getattr(model, _ATTRIBUTE)
    if session.calibrating and several_ranks():
        share_ranges(model)
    if model.training:
        session.dirty = True
    elif session.dirty and not torch.compiler.is_compiling():
        write_record(model)


def _before_state_dict(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise_if_invalid(model)


def _after_load(model: nn.Module, incompatible: Any) -> None:
    session = getattr(model, _ATTRIBUTE)
    session.dirty = session.calibrating = True


def _calibrated(layer: CompressedLayer) -> bool:
    return layer.activation is not None and all(q.calibrated for q in (layer.activation, *layer.own_quantizers))


def _sparse_record(name: str, layer: CompressedLayer) -> SparseRecord:
    assert layer.sparsity is not None
    mask = layer.sparsity.mask
    return SparseRecord(name=name, mask_shape=tuple(mask.shape), mask=tuple(ops.pack_mask(mask).tolist()))


def _quant_record(name: str, layer: CompressedLayer, plan: Plan) -> QuantRecord:
    activation, weight = layer.activation, layer.weight_quant
    assert activation is not None and weight is not None
    scale_d, offset_d = activation.factors()
    scale_w = tuple(layer.recorded_scale_w().float().tolist())
    entry = QuantRecord(
        key=name,
        scale_d=_through_fp16(scale_d) if plan.fp16 else scale_d,
        offset_d=offset_d,
        scale_w=scale_w,
        offset_w=(0,) * len(scale_w),
        act_type=f"INT{activation.num_bits}",
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
        scale_h=_through_fp16(scale_h) if plan.fp16 else scale_h,
        offset_h=offset_h,
        scale_r=scale_r,
        offset_r=(0,) * len(scale_r),
    )


def _scales(entry: QuantRecord) -> tuple[float, ...]:
    hidden = () if entry.scale_h is None else (entry.scale_h,)
    return (entry.scale_d, *entry.scale_w, *hidden, *entry.scale_r)


def _through_fp16(value: float) -> float:
    """Round a scale to half precision; outside half's normal range its square root is rounded instead (AMCT's rule)."""
    if _SMALLEST_FP16 <= value <= _LARGEST_FP16:
        return float(torch.tensor(value).half().float())
    root = torch.tensor(math.sqrt(value)).half().float()
    return float(root * root)


def _close(ours: Any, theirs: Any) -> bool:
    """Equal as float32 up to the last digits that another device's reduction order may change."""
    a, b = torch.tensor(list(ours), dtype=torch.float32), torch.tensor(list(theirs), dtype=torch.float32)
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-5, atol=0.0))
