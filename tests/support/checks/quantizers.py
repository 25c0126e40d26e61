"""The quantisers of a compressed model."""

from __future__ import annotations

from torch import nn

from amct_ext.layers.activation.quantizer import ActivationQuantizer


def quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    return [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
