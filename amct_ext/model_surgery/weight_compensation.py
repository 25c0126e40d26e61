"""Weights of a model that compensate for their rounding, once their layers are calibrated."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from amct_ext.common.ranks import average_, sum_
from amct_ext.layers.conv_linear import ProductLayer
from amct_ext.layers.rounding_compensation import RoundingCompensation, compensated_weight
from amct_ext.model_surgery.lookup import every_layer
from amct_ext.model_surgery.session import ATTRIBUTE, Session

_UNSEEN = "calibrated in a compiled graph, outside of the model's forward, or on zeros"
logger = logging.getLogger("amct_ext")


def weights_are_open(model: nn.Module) -> bool:
    """Whether a calibration is still to change weights."""
    return any(not compensation.settled for _, compensation in _compensated(model))


@torch.no_grad()
def compensate_weights(model: nn.Module) -> None:
    """Change the weights of the layers whose calibration has finished, once, in place.

    Called on all ranks after each training forward, when these agree which calibrations are finished. The moments of
    all ranks are added. The write raises no version, for the backward of the forward just made may still come: its
    gradient of a learned scale mixes the weight of before and after, once. The optimizer's first step must not have
    come, nor a copy of the weights in float32 been made for it. Weights that are sharded, that another module has, too,
    or whose layer calibrated in a compiled graph stay, with one warning.
    """
    kept: dict[str, str] = {}
    owners: Counter[int] = Counter()
    for layer, compensation in _due(model):
        owners = owners or Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        reason = _obstacle(layer, compensation, owners) or _compensate(layer, compensation)
        compensation.settle()
        if reason:
            kept[layer.layer_name] = reason
    _tell(kept)
    session: Session = getattr(model, ATTRIBUTE)
    session.weights_to_compensate = weights_are_open(model)


def tell_uncompensated(model: nn.Module) -> None:
    """Before the state is taken: log which layers were calibrated where nothing could be gathered."""
    kept: dict[str, str] = {}
    for layer, compensation in _due(model):
        compensation.settle()
        kept[layer.layer_name] = _UNSEEN
    _tell(kept)


def compensation_after_load(model: nn.Module) -> None:
    """What was loaded with a finished calibration holds the changed weights already."""
    for layer, compensation in _compensated(model):
        if not layer.weight.is_meta:
            compensation.restart(settled=layer.activation is None or layer.activation.calibrated)


def _compensated(model: nn.Module) -> Iterator[tuple[ProductLayer, RoundingCompensation]]:
    for layer in every_layer(model):
        if isinstance(layer, ProductLayer) and layer.compensation is not None:
            yield layer, layer.compensation


def _due(model: nn.Module) -> list[tuple[ProductLayer, RoundingCompensation]]:
    """The layers whose weight is to be changed now."""
    return [
        (layer, compensation)
        for layer, compensation in _compensated(model)
        if not (compensation.settled or layer.weight.is_meta)
        and layer.activation is not None
        and layer.activation.calibrated
    ]


def _obstacle(layer: ProductLayer, compensation: RoundingCompensation, owners: Counter[int]) -> str:
    """Why the weight of a layer stays; '' where nothing is in the way."""
    if hasattr(layer.weight, "full_tensor") or layer.weight.shape != compensation.shape:
        return "the weight is sharded"
    if owners[id(layer.weight)] > 1:
        return "another module has the weight, too"
    return ""


def _compensate(layer: ProductLayer, compensation: RoundingCompensation) -> str:
    """Change the weight of one layer; returns why it was not."""
    assert layer.weight_quant is not None
    layer.initialise_scales()
    weight = layer.weight.detach()
    moment = compensation.moment
    if moment is None:  # a layer that this rank did not run
        size = weight[0].numel()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        moment = torch.zeros(size, size, dtype=dtype, device=weight.device)
    moment = moment.to(weight.device)
    sum_(moment)
    if not bool(moment.any()):
        return _UNSEEN
    quantizer = layer.weight_quant
    scale = quantizer.current_scale(weight)
    changed = compensated_weight(weight, moment, scale, quantizer.num_bits, not quantizer.learned)
    if changed is weight:
        return "the second moments of its inputs are not finite, or singular"
    if not quantizer.learned:
        # The scale that follows the weight must be this one again; else its channel would be rounded a second time.
        same = torch.isclose(quantizer.current_scale(changed), scale, rtol=1e-3, atol=0.0)
        changed = torch.where(same.reshape(-1, *[1] * (weight.dim() - 1)), changed, weight)
    changed = changed.contiguous()
    average_([changed])  # bit by bit the same on all ranks, whatever their libraries do
    layer.weight.data.copy_(changed)
    if layer.integer is not None:
        layer.integer.drop_packed_weight()
    return ""


def _tell(kept: dict[str, str]) -> None:
    if kept:
        parts = [
            f"{', '.join(f'{name!r}' for name, why in kept.items() if why == reason)} ({reason})"
            for reason in dict.fromkeys(kept.values())
        ]
        logger.warning("compensate_rounding: %d layer(s) keep their weights: %s", len(kept), "; ".join(parts))
