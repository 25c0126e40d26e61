"""What a compressed model knows about itself, and the hook that records its factors when it is evaluated."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_ext import ops
from amct_ext.config.plan import Plan
from amct_ext.errors import ModelError, StaleStateError
from amct_ext.files import keep_old, write_if_changed
from amct_ext.flow.rank_ranges import share_ranges
from amct_ext.flow.surgery import (
    compressed_layers,
    every_layer,
    link_norms,
    norms_linked,
    placed_layers,
)
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.pending import Running, plain
from amct_ext.layers.phase import leaves_no_trace
from amct_ext.layers.quantizers import ActivationQuantizer, WeightQuantizer
from amct_ext.layers.rnn import CompressedRNN
from amct_ext.layers.sparsity import Sparsity
from amct_ext.ranks import first_rank, several_ranks
from amct_ext.reasons import LayerReasons
from amct_ext.record.types import ChannelRecord, QuantRecord, Record, SparseRecord

logger = logging.getLogger("amct_ext")

_ATTRIBUTE = "amct_ext_session"
_SMALLEST_FP16, _LARGEST_FP16 = 2.0**-14, 65504.0


@dataclass
class Session:
    """Facts of one compressed model; plain data, copied and pickled with the model.

    A copy (teacher, average, a model handed to another framework) has no record file until it is given one; a pickle
    keeps it.
    """

    plan: Plan
    record_file: str | None
    channel: tuple[ChannelRecord, ...] = ()
    conv_bn: dict[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()  # compressed layers in execution order
    reasons: dict[str, LayerReasons] = field(default_factory=dict)  # why layers are left alone
    evaluated: tuple[Any, ...] | None = None  # the state that the last evaluation began with
    recorded: tuple[Any, ...] | None = None  # what the record was made of; None: not of the present state
    written: bytes | None = None  # content of the record file, when this model last wrote it
    export_note: str = ""  # what create found out about saving this model
    running: Running = field(default_factory=Running)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"evaluated": None, "recorded": None}  # identities of this process

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        new = copy.copy(self)
        memo[id(self)] = new
        new.record_file = new.written = None
        new.running = copy.deepcopy(self.running, memo)
        return new


def attach(model: nn.Module, session: Session) -> None:
    """Give the model its session and the hooks that keep the record file up to date."""
    setattr(model, _ATTRIBUTE, session)
    for layer in every_layer(model):
        for quantizer in layer.own_quantizers:
            quantizer.running = session.running
        for weight in layer.weight_quantizers:
            weight.running = session.running
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
    session: Session | None = vars(model).get(_ATTRIBUTE)
    if session is None:
        inside = [name for name, module in model.named_modules() if _ATTRIBUTE in vars(module)]
        found = f" (its submodule '{inside[0]}' was)" if inside else ""
        raise ModelError(
            f"{type(model).__name__} was not made by create_* or restore_* of amct_ext{found}; pass what they returned"
        )
    return session


def build_record(model: nn.Module, with_factors: bool = True) -> Record:
    """The record of the model as it is now: channel groups, 2:4 masks and, once calibrated, quantisation factors."""
    layers = placed_layers(model).items()
    sparse = tuple(_sparse_record(name, layer) for name, (_, layer) in layers if layer.sparsity is not None)
    return Record(_factors(model) if with_factors else (), session_of(model).channel, sparse)


def present_pairs(model: nn.Module) -> dict[str, str]:
    """The (conv -> BN) pairs, convolutions by their present names; without those that are no longer in the model."""
    return link_norms(model, session_of(model).conv_bn)


def start_record(model: nn.Module) -> None:
    """Write the record of a model just created, without factors; an older one that says something else is kept.

    Errors: OSError.
    """
    session = session_of(model)
    assert session.record_file is not None
    if first_rank():
        content = build_record(model, with_factors=False).dumps().encode()
        kept = keep_old(session.record_file, content)
        if kept is not None:
            logger.warning(
                "%s holds the record of another run; it is kept as %s, and replaced by that of the model created now",
                session.record_file,
                kept,
            )
        write_if_changed(session.record_file, content)
        session.written = content


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
    if first_rank():
        content = record.dumps().encode()
        if path == session.record_file:
            _warn_of_other_writers(session, content)
        write_if_changed(path, content)
        session.written = content
    session.record_file = session.record_file or path
    if path == session.record_file:
        complete = record.quant and _shifts_complete(model, session.plan)
        session.recorded = _state_behind(model) if complete or not session.plan.quant_active else None


def _warn_of_other_writers(session: Session, content: bytes) -> None:
    """Say so where the record file is about to lose what somebody else wrote since this model's last write."""
    if session.written is None or session.record_file is None:
        return
    try:
        found = Path(session.record_file).read_bytes()
    except OSError:
        return
    if found not in (session.written, content):
        logger.warning(
            "%s: another model or process wrote to this record file; it is replaced by the factors of the model "
            "evaluated now. Give each model a record file of its own",
            session.record_file,
        )


def _state_behind(model: nn.Module) -> tuple[Any, ...]:
    """Identity and version of every tensor that recorded factors follow from; writes of forwards do not count."""
    tensors: list[torch.Tensor | None] = []
    clips: list[tuple[torch.Tensor, int]] = []
    for layer in every_layer(model):
        tensors += layer._parameters.values()
        for child in layer._modules.values():
            if isinstance(child, WeightQuantizer):
                tensors += child._parameters.values()  # a learned scale
            elif isinstance(child, Sparsity):
                tensors.append(child.mask)
            elif isinstance(child, ActivationQuantizer):
                clips += [(clip, child.own_writes) for clip in child._parameters.values() if clip is not None]
        norm = layer.links.norm
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
        ours, theirs = present[key], recorded[key]
        same = (ours.offset_d, ours.offset_h) == (theirs.offset_d, theirs.offset_h)
        if not (same and _close(_scales(ours), _scales(theirs))):
            wrong.append(key)
    if wrong:
        raise StaleStateError(
            f"{source}: the recorded factors of {len(wrong)} layer(s) are not those of the model "
            f"({', '.join(sorted(wrong)[:5])}{', ...' if len(wrong) > 5 else ''}); it was trained on, loaded or copied "
            f"since. Call amct_ext.update_record(model, {source!r}) before saving"
        )


def raise_if_invalid(model: nn.Module) -> None:
    """Raise InvalidDataError for a layer whose input held NaN/Inf since the last check."""
    quantisers = _quantizers(model)
    if quantisers and not quantisers[0].invalid.is_meta and bool(torch.stack([q.invalid for q in quantisers]).any()):
        for quantiser in quantisers:
            quantiser.raise_if_invalid()


def _factors(model: nn.Module) -> tuple[QuantRecord, ...]:
    """The factors of all quantised layers in execution order; none before every calibration is finished."""
    session = session_of(model)
    layers = {name: layer for name, (_, layer) in placed_layers(model).items()}
    quantised = [name for name in session.order if name in layers and layers[name].weight_quant is not None]
    if not all(layers[name].ready for name in quantised):
        return ()
    present_pairs(model)
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


def _quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    return [quantizer for layer in every_layer(model) for quantizer in layer.own_quantizers]


def untraced(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, run as it is also where a graph breaks and Dynamo goes on with what is called next."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _before_forward(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    session = getattr(model, _ATTRIBUTE)
    session.running.enter(sys._getframe(1), model.training)
    if not model.training:
        if not norms_linked(model, session.conv_bn):
            link_norms(model, session.conv_bn)
        if not leaves_no_trace():
            _note_state(model, session)


def _note_state(model: nn.Module, session: Session) -> None:
    """Before an evaluation: shifts that were searched on another state, which each layer feels, start over.

    Of what was loaded or copied the scales tell.
    """
    state = _state_behind(model)
    if state == session.evaluated or _without_values(model):
        return
    searches = [(layer.search_n, layer) for layer in every_layer(model) if layer.search_n is not None]
    searches = [(search, layer) for search, layer in searches if search.has_result]
    own = session.evaluated is not None and all(search.is_own for search, _ in searches)
    if own or not all(layer.ready and search.made_with(layer.deq_scale()) for search, layer in searches):
        for search, _ in searches:
            search.forget()
    session.evaluated = state


def _leave_forward(model: nn.Module, args: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    getattr(model, _ATTRIBUTE).running.leave(sys._getframe(1))
    values = plain(output)
    return None if values is output else values


def _after_forward(model: nn.Module, args: Any, output: Any) -> None:
    session = getattr(model, _ATTRIBUTE)
    learning = model.training or session.running.calibrating
    if several_ranks() and not leaves_no_trace():
        quantizers = _quantizers(model)
        if learning or any(quantizer.training for quantizer in quantizers):
            share_ranges(quantizers)
    if torch.compiler.is_compiling() or leaves_no_trace():
        return
    if learning:
        session.recorded = None
    elif session.record_file is not None:
        untraced(_follow)(model)


def _follow(model: nn.Module) -> None:
    """Write the record anew where the state behind it is not what it was made of."""
    session = session_of(model)
    if _without_values(model):
        return
    if session.recorded is None or session.recorded != session.evaluated:
        write_record(model)


def _without_values(model: nn.Module) -> bool:
    """Whether the model is on the meta device."""
    return any(parameter.is_meta for parameter in itertools.islice(model.parameters(), 1))


def _before_state_dict(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise_if_invalid(model)


def _after_load(model: nn.Module, incompatible: Any) -> None:
    session = getattr(model, _ATTRIBUTE)
    session.recorded = session.evaluated = None


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
