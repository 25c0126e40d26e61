"""What a compressed model does around each of its forwards, and when its state is taken or loaded."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_ext.common.ranks import is_distributed
from amct_ext.layers.chains.chain_values import with_history
from amct_ext.layers.forward_context import state_updates_disabled
from amct_ext.layers.products.deferred_tensor import materialize
from amct_ext.model_surgery.apply_gptq import (
    apply_gptq,
    has_pending_gptq,
    reset_gptq_after_load,
    warn_skipped_gptq,
)
from amct_ext.model_surgery.batchnorm_links import batchnorms_linked, link_batchnorms
from amct_ext.model_surgery.lookup import compressed_modules
from amct_ext.model_surgery.output_range_search import keep_calibration_input, search_output_ranges
from amct_ext.model_surgery.range_averaging import average_ranges
from amct_ext.model_surgery.record_factors import state_versions, write_record
from amct_ext.model_surgery.session import (
    ATTRIBUTE,
    Session,
    activation_quantizers,
    added_buffers,
    raise_if_invalid,
    session_of,
)


def attach(model: nn.Module, session: Session) -> None:
    """Give the model its session and the hooks that keep the record file up to date."""
    setattr(model, ATTRIBUTE, session)
    for layer in compressed_modules(model):
        for quantizer in layer.own_quantizers:
            quantizer.tracker = session.tracker
        for weight in layer.weight_quantizers:
            weight.tracker = session.tracker
    # Ranks agree on our buffers by construction, or keep their own (the flag for NaN): nothing to broadcast.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, added_buffers(model))
    model.register_forward_pre_hook(_before_forward)
    _note_pending(model, session)
    if session.output_search_pending:
        model.register_forward_pre_hook(_keep_calibration_input, with_kwargs=True)
    model.register_forward_hook(_after_forward)
    model.register_forward_hook(_end_forward, always_call=True)
    model.register_state_dict_pre_hook(_before_state_dict)
    model.register_load_state_dict_post_hook(_after_load)


def _note_pending(model: nn.Module, session: Session) -> None:
    """Note what the end of a calibration has yet to do, so that later forwards need not look for it."""
    session.output_search_pending = any(not quantizer.range_decided for quantizer in activation_quantizers(model))
    session.gptq_pending = has_pending_gptq(model)


def detach(model: nn.Module) -> None:
    """Take session and hooks off again: for a copy that is no compressed model any more."""
    for name in (ATTRIBUTE, "_ddp_params_and_buffers_to_ignore"):
        vars(model).pop(name, None)
    attached = (_before_forward, _keep_calibration_input, _after_forward, _end_forward, _before_state_dict, _after_load)
    every = (
        model._forward_pre_hooks,
        model._forward_hooks,
        model._state_dict_pre_hooks,
        model._load_state_dict_post_hooks,
    )
    for hooks in every:
        for key in [key for key, hook in hooks.items() if hook in attached]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def outside_dynamo(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, run as it is also where a graph breaks and Dynamo goes on with what is called next."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _before_forward(model: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling():
        return
    session = getattr(model, ATTRIBUTE)
    session.tracker.enter(sys._getframe(1), model.training)
    if not model.training:
        if not batchnorms_linked(model, session.conv_bn):
            link_batchnorms(model, session.conv_bn)
        if not state_updates_disabled():
            _reset_stale_shifts(model, session)


def _keep_calibration_input(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    if getattr(model, ATTRIBUTE).output_search_pending:
        keep_calibration_input(model, args, kwargs)


def _reset_stale_shifts(model: nn.Module, session: Session) -> None:
    """Before an evaluation, reset shifts that were searched on another state.

    A change by load or copy is recognised by the scales.
    """
    state = state_versions(model)
    if state == session.evaluated_state or _on_meta_device(model):
        return
    searches = [(layer.search_n, layer) for layer in compressed_modules(model) if layer.search_n is not None]
    searches = [(search, layer) for search, layer in searches if search.has_result]
    own = session.evaluated_state is not None and all(search.errors_are_own for search, _ in searches)
    if own or not all(layer.ready and search.matches_scale(layer.deq_scale()) for search, layer in searches):
        for search, _ in searches:
            search.reset()
    session.evaluated_state = state


def _end_forward(model: nn.Module, args: object, output: object) -> object:
    if torch.compiler.is_compiling():
        return None
    getattr(model, ATTRIBUTE).tracker.exit(sys._getframe(1))
    values = with_history(materialize(output))
    return None if values is output else values


def _after_forward(model: nn.Module, args: object, output: object) -> None:
    session = getattr(model, ATTRIBUTE)
    learning = model.training or session.tracker.calibrating
    pending = session.output_search_pending or session.gptq_pending
    if (is_distributed() or pending) and not state_updates_disabled():
        quantizers = activation_quantizers(model)
        if learning or any(quantizer.training for quantizer in quantizers):
            average_ranges(quantizers)
            if session.gptq_pending and not torch.compiler.is_compiling():
                apply_gptq(model)
            if session.output_search_pending and not torch.compiler.is_compiling():
                search_output_ranges(model)
    if torch.compiler.is_compiling() or state_updates_disabled():
        return
    if learning:
        session.recorded_state = None
    elif session.record_file is not None:
        outside_dynamo(_refresh_record)(model)


def _refresh_record(model: nn.Module) -> None:
    """Write the record anew where the state behind it is not what it was made of."""
    session = session_of(model)
    if _on_meta_device(model):
        return
    if session.recorded_state is None or session.recorded_state != session.evaluated_state:
        write_record(model)


def _on_meta_device(model: nn.Module) -> bool:
    """Whether the model is on the meta device."""
    return any(parameter.is_meta for parameter in itertools.islice(model.parameters(), 1))


def _before_state_dict(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise_if_invalid(model)
    if getattr(model, ATTRIBUTE).gptq_pending:
        warn_skipped_gptq(model)
    for layer in compressed_modules(model):
        layer.repair_scales()


def _after_load(model: nn.Module, incompatible: object) -> None:
    session = getattr(model, ATTRIBUTE)
    session.recorded_state = session.evaluated_state = None
    reset_gptq_after_load(model)
    _note_pending(model, session)
