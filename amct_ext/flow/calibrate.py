"""Calibration of a compressed model without training it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from amct_ext.arguments import unwrap
from amct_ext.errors import StaleStateError
from amct_ext.flow.session import session_of
from amct_ext.flow.surgery import compressed_layers


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Find the activation ranges of a compressed model by evaluating batches, and start learned weight scales.

    ``batches``: what the model is called with: tensors, tuples of positional arguments, or mappings of keyword
    arguments; on the model's device. As many are taken as the configuration's ``batch_num`` asks for. Otherwise
    training forwards do the same as they come. The model is in eval mode meanwhile and keeps its mode; dropout is off,
    BatchNorm uses its running statistics, and weights, masks and gradients stay as they are. In a distributed job all
    ranks call it with data of their own. Layers that are calibrated keep their ranges. Errors: ModelError (not a
    compressed model), TypeError (one batch instead of several), StaleStateError naming the layers that saw too few
    batches, InvalidDataError (NaN or Inf).
    Source: the range search is AMCT's, which runs it in training forwards only.
    """
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise TypeError(f"batches is one {type(batches).__name__}; give several batches, or [batch]")
    inner = unwrap(model)
    running = session_of(inner).running
    layers = dict(compressed_layers(inner))
    modes = [(module, module.training) for module in inner.modules()]
    inner.eval()
    running.calibrating = True
    try:
        for batch in batches:
            _call(model, batch)
            if not _waiting(layers):
                break
    finally:
        running.calibrating = False
        for module, mode in modes:
            module.training = mode
    missing = _waiting(layers)
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise StaleStateError(
            f"{len(missing)} layer(s) saw fewer batches than their calibration takes (batch_num): {shown}; give more "
            "batches, and ones that reach these layers"
        )
    for layer in layers.values():
        layer.start_scales()


def _waiting(layers: Any) -> list[str]:
    """Layers whose calibration is not finished."""
    return [name for name, layer in layers.items() if not all(q.calibrated for q in layer.own_quantizers)]


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)
