"""Calibration of a compressed model without training it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from amct_ext.common.wrapping import unwrap
from amct_ext.errors import StaleStateError
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.run import in_mode
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.session import session_of


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Find the activation ranges of a compressed model by evaluating batches, and start learned weight scales.

    Otherwise training forwards do the same as they come. ``batches``: what the model is called with, each in a form
    that create takes as ``input_data``, on the model's device. As many are taken as the configuration's ``batch_num``
    asks for. In a distributed job all ranks call it with data of their own.

    State changed: the ranges of layers that are not calibrated yet, learned scales that are not set yet, and with
    `compensate_rounding` INT4 weights, once (call it before an optimizer keeps a copy of them). The model is in eval
    mode meanwhile and keeps its mode: dropout is off, BatchNorm uses its running statistics. Masks, gradients and other
    weights stay.

    Errors: ModelError (not a compressed model), TypeError (one batch instead of several), InputDataError (a batch that
    is no call of the model), StaleStateError naming the layers that saw too few batches, InvalidDataError (NaN or Inf).
    Source: the range search is AMCT's, which runs it in training forwards only.
    """
    inner = unwrap(model)
    tracker = session_of(inner).tracker
    layers = dict(compressed_layers(inner))
    check_batches(batches)
    with in_mode(inner, training=False):
        tracker.calibrating = True
        try:
            for batch in batches:
                parse_inputs(inner, batch).call(model)
                if not _uncalibrated(layers):
                    break
        finally:
            tracker.calibrating = False
    missing = _uncalibrated(layers)
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise StaleStateError(
            f"{len(missing)} layer(s) saw fewer batches than their calibration takes (batch_num): {shown}; give more "
            "batches, and ones that reach these layers"
        )
    for layer in layers.values():
        layer.initialize_scales()


def _uncalibrated(layers: Mapping[str, CompressedLayer]) -> list[str]:
    """Layers whose calibration is not finished."""
    return [name for name, layer in layers.items() if not all(q.calibrated for q in layer.own_quantizers)]


def check_batches(batches: object) -> None:
    """Raise TypeError where one batch is given instead of several: it would be taken apart."""
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise TypeError(f"batches is one {type(batches).__name__}; give several batches, or [batch]")
