"""GPTQ on the layers of a model, once they are calibrated (`compensate_rounding` in the configuration)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from amct_ext.common.ranks import all_reduce_mean_, all_reduce_sum_
from amct_ext.layers.conv_linear import GptqLayer
from amct_ext.layers.weight.gptq import GptqState, gptq_weight
from amct_ext.model_surgery.lookup import compressed_modules
from amct_ext.model_surgery.session import ATTRIBUTE, Session

_NO_HESSIAN = "calibrated in a compiled graph, outside of the model's forward, or on zeros"
logger = logging.getLogger("amct_ext")


def has_pending_gptq(model: nn.Module) -> bool:
    """Whether a calibration has yet to change weights."""
    return any(not gptq.done for _, gptq in _states(model))


@torch.no_grad()
def apply_gptq(model: nn.Module) -> None:
    """Change the weights of the layers whose calibration has finished, once, in place.

    Called on all ranks after each training forward, when these agree which calibrations are finished. The Hessians of
    all ranks are added. The optimizer must not have made a step yet, nor a float32 copy of the weights. Weights that
    are sharded, that another module has too, or whose layer calibrated in a compiled graph stay, with one warning.

    The write does not raise the weight's version, because the backward of the forward just made may still come. Its
    gradient of a learned scale is then computed from the old output and the new weight, once.
    """
    skipped: dict[str, str] = {}
    owners: Counter[int] = Counter()
    for layer, gptq in _pending(model):
        owners = owners or Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        reason = _reason_to_skip(layer, gptq, owners) or _apply(layer, gptq)
        gptq.finish()
        if reason:
            skipped[layer.layer_name] = reason
    _warn(skipped)
    session: Session = getattr(model, ATTRIBUTE)
    session.gptq_pending = has_pending_gptq(model)


def warn_skipped_gptq(model: nn.Module) -> None:
    """Before a state dict is taken: warn of layers that were calibrated where nothing could be gathered."""
    skipped: dict[str, str] = {}
    for layer, gptq in _pending(model):
        gptq.finish()
        skipped[layer.layer_name] = _NO_HESSIAN
    _warn(skipped)


def reset_gptq_after_load(model: nn.Module) -> None:
    """After a load: layers whose calibration is finished hold the changed weights already."""
    for layer, gptq in _states(model):
        if not layer.weight.is_meta:
            gptq.reset(done=layer.input_quantizer is None or layer.input_quantizer.calibrated)


def _states(model: nn.Module) -> Iterator[tuple[GptqLayer, GptqState]]:
    for layer in compressed_modules(model):
        if isinstance(layer, GptqLayer) and layer.gptq is not None:
            yield layer, layer.gptq


def _pending(model: nn.Module) -> list[tuple[GptqLayer, GptqState]]:
    """The layers that are calibrated and whose weight GPTQ has yet to change."""
    return [
        (layer, gptq)
        for layer, gptq in _states(model)
        if not (gptq.done or layer.weight.is_meta)
        and layer.input_quantizer is not None
        and layer.input_quantizer.calibrated
    ]


def _reason_to_skip(layer: GptqLayer, gptq: GptqState, owners: Counter[int]) -> str:
    """Why GPTQ cannot change the weight of a layer; '' where it can."""
    if hasattr(layer.weight, "full_tensor") or layer.weight.shape != gptq.shape:
        return "the weight is sharded"
    if owners[id(layer.weight)] > 1:
        return "another module has the weight, too"
    return ""


def _apply(layer: GptqLayer, gptq: GptqState) -> str:
    """Change the weight of one layer. Returns why it was skipped, or ''."""
    assert layer.weight_quant is not None
    layer.initialize_scales()
    weight = layer.weight.detach()
    hessian = gptq.hessian
    if hessian is None:  # a layer that this rank did not run
        size = weight[0].numel()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        hessian = torch.zeros(size, size, dtype=dtype, device=weight.device)
    hessian = hessian.to(weight.device)
    all_reduce_sum_(hessian)
    if not bool(hessian.any()):
        return _NO_HESSIAN
    quantizer = layer.weight_quant
    scale = quantizer.current_scale(weight)
    changed = gptq_weight(weight, hessian, scale, quantizer.num_bits, not quantizer.learned)
    if changed is weight:
        return "the second moments of its inputs are not finite, or singular"
    if not quantizer.learned:
        # The scale that follows the weight must be this one again; else its channel would be rounded a second time.
        same = torch.isclose(quantizer.current_scale(changed), scale, rtol=1e-3, atol=0.0)
        changed = torch.where(same.reshape(-1, *[1] * (weight.dim() - 1)), changed, weight)
    changed = changed.contiguous()
    all_reduce_mean_([changed])  # bit by bit the same on all ranks, whatever their libraries do
    layer.weight.data.copy_(changed)
    if layer.product_choice is not None:
        layer.product_choice.drop_packed_weight()
    return ""


def _warn(skipped: dict[str, str]) -> None:
    if skipped:
        parts = [
            f"{', '.join(f'{name!r}' for name, why in skipped.items() if why == reason)} ({reason})"
            for reason in dict.fromkeys(skipped.values())
        ]
        logger.warning("compensate_rounding: %d layer(s) keep their weights: %s", len(skipped), "; ".join(parts))
