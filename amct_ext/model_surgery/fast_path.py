"""Transformer encoders run layer by layer: torch's fused path reads their weights without calling the layers."""

from __future__ import annotations

import logging

from torch import nn

logger = logging.getLogger("amct_ext")


def disable_fast_path(model: nn.Module) -> nn.Module:
    """Switch nested tensors and the fused kernel of torch's encoders off, in place; returns the model.

    In eval mode without gradients they would run past the quantised layers, and past the trace. The numbers are the
    same but for rounding; an encoder given a padding mask returns values where it would return zeros (at padded
    positions), as it does in training. Source: torch.nn.TransformerEncoder.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and module.enable_nested_tensor:
            module.enable_nested_tensor = module.use_nested_tensor = False
            logger.info("'%s' runs with enable_nested_tensor=False, so that the layers inside are called", name)
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # how a layer says that the fused kernel cannot compute it
    return model
