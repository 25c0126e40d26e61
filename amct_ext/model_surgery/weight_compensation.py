"""Weights of a model that compensate for their rounding, once their layers are calibrated."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from amct_ext.common.ranks import average_, sum_
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.rounding_compensation import compensated_weight
from amct_ext.model_surgery.lookup import every_layer
from amct_ext.model_surgery.session import ATTRIBUTE, Session

_log = logging.getLogger("amct_ext")


def weights_are_open(model: nn.Module) -> bool:
    """Whether a calibration is still to change weights."""
    return any(layer.compensation is not None and not layer.compensation.settled for layer in every_layer(model))


@torch.no_grad()
def compensate_weights(model: nn.Module) -> None:
    """Change the weights of the layers whose calibration has finished, once, in place.

    Called on all ranks after each training forward, when these agree which calibrations are finished. The moments of
    all ranks are added. The write raises no version, for the backward of the forward just made may still come; the
    optimizer's first step must not have come, nor a copy of the weights in float32 been made for it. Weights that are
    sharded, that another module has, too, or whose layer calibrated in a compiled graph stay, with one warning.
    """
    kept: dict[str, str] = {}
    owners: Counter[int] = Counter()
    for layer in _calibrated(model):
        owners = owners or Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        reason = _obstacle(layer, owners) or _compensate(layer)
        assert layer.compensation is not None
        layer.compensation.settle()
        if reason:
            kept[layer.layer_name] = reason
    _tell(kept)
    session: Session = getattr(model, ATTRIBUTE)
    session.weights_to_compensate = weights_are_open(model)


def tell_uncompensated(model: nn.Module) -> None:
    """Before the state is taken: log which layers were calibrated where nothing could be gathered."""
    kept: dict[str, str] = {}
    for layer in _calibrated(model):
        assert layer.compensation is not None
        layer.compensation.settle()
        kept[layer.layer_name] = _UNSEEN
    _tell(kept)


def after_load(model: nn.Module) -> None:
    """What was loaded with a finished calibration holds the changed weights already."""
    for layer in every_layer(model):
        if layer.compensation is not None and not layer.weight.is_meta:
            layer.compensation.restart(settled=layer.activation is None or layer.activation.calibrated)


_UNSEEN = "it was calibrated in a compiled graph or outside of the model's forward"


def _calibrated(model: nn.Module) -> list[CompressedLayer]:
    """The layers whose weight is to be changed now."""
    found = []
    for layer in every_layer(model):
        if layer.compensation is None or layer.compensation.settled or layer.weight.is_meta:
            continue
        if layer.activation is not None and layer.activation.calibrated:
            found.append(layer)
    return found


def _obstacle(layer: CompressedLayer, owners: Counter[int]) -> str:
    """Why the weight of a layer stays; '' where nothing is in the way."""
    weight = layer.weight
    if hasattr(weight, "full_tensor") or weight.shape != layer.whole_weight_shape:
        return "its weight is sharded"
    if owners[id(weight)] > 1:
        return "another module has its weight, too"
    return ""


def _compensate(layer: CompressedLayer) -> str:
    """Change the weight of one layer; returns why it was not."""
    assert layer.weight_quant is not None and layer.compensation is not None
    layer.initialise_scales()
    weight = layer.weight.detach()
    moment = layer.compensation.moment
    if moment is None:
        size = weight[0].numel()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        moment = torch.zeros(size, size, dtype=dtype, device=weight.device)
    moment = moment.to(weight.device)
    sum_(moment)
    if not bool(moment.any()):
        return _UNSEEN
    changed = compensated_weight(
        weight, moment, layer.weight_quant.current_scale(weight), layer.weight_quant.num_bits
    ).contiguous()
    average_([changed])  # bit by bit the same on all ranks, whatever their libraries do
    layer.weight.data.copy_(changed)
    if layer.integer is not None:
        layer.integer.drop_packed_weight()
    return ""


def _tell(kept: dict[str, str]) -> None:
    reasons: Iterable[str] = dict.fromkeys(kept.values())
    if kept:
        listed = "; ".join(
            f"{reason}: " + ", ".join(f"'{name}'" for name, why in kept.items() if why == reason) for reason in reasons
        )
        _log.warning("compensate_rounding: %d layer(s) keep their weights: %s", len(kept), listed)
