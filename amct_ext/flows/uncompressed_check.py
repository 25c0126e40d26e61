"""Whether a model is one that can be compressed, asked before anything is traced."""

from __future__ import annotations

import torch
from torch import nn

from amct_ext.errors import ModelError
from amct_ext.layers.compressed import CompressedLayer

# Class names of AMCT's own modules: a model that holds one is compressed already.
_AMCT_CLASSES = {
    "IFMR",
    "HFMG",
    "Recorder",
    "AscendQuant",
    "AscendDeQuant",
    "RetrainQuant",
    "RNNRetrainQuant",
    "MarkedQuantizableModule",
    "QuantIdentity",
    "SelectiveMaskGen",
    "DMQBalancer",
    "Conv2dQAT",
    "LinearQAT",
    "LSTMQAT",
    "GRUQAT",
    "OFMRQuant",
    "ConvTranspose1dQAT",
}


def check_model(model: nn.Module) -> None:
    """Raise ModelError (a RuntimeError) where the model holds compressed layers of ours or of AMCT, or no data."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer) or type(module).__name__ in _AMCT_CLASSES:
            raise ModelError(
                f"the model is compressed already: '{name}' is a {type(module).__name__}; pass the original float model"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model itself is TorchScript, whose layers cannot be exchanged; pass the nn.Module behind it"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                f"'{name}' is on the meta device and holds no values; load the model's weights before it is compressed "
                "(model.to_empty(device=...), then load_state_dict)"
            )
