"""Checks of the public functions' arguments, and DistributedDataParallel taken off and put back."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
_LONGEST_NAME = 254


def check_types(**arguments: tuple[Any, ...]) -> None:
    """Each ``name=(value, type, ...)``; raises TypeError, naming the argument, where the value is none of the types."""
    for name, (value, *types) in arguments.items():
        if not isinstance(value, tuple(types)):
            wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
            raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")


def check_record_name(path: str, argument: str = "record_file") -> None:
    """Raise ValueError where ``path`` cannot name a file."""
    name = os.path.basename(path)
    if not path or not name or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"{argument} must name a file (1 to {_LONGEST_NAME} characters after the last '/'), not '{path}'"
        )


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


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def wrap_like(original: nn.Module, model: nn.Module) -> nn.Module:
    """Wrap ``model`` in DistributedDataParallel with the settings of ``original``, where that is wrapped.

    A fresh wrapper: the old one's gradient buckets do not know the new parameters.
    """
    if not isinstance(original, DistributedDataParallel):
        return model
    return DistributedDataParallel(
        model,
        device_ids=original.device_ids,
        output_device=original.output_device,
        dim=original.dim,
        broadcast_buffers=original.broadcast_buffers,
        process_group=original.process_group,
        find_unused_parameters=original.find_unused_parameters,
        gradient_as_bucket_view=original.gradient_as_bucket_view,
        static_graph=original.static_graph,
    ).train(original.training)
