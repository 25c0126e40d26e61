"""Brings a model from its first state to one as after training: nothing in it is the identity by chance."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomize_norms(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Draws factors and terms of the normalisations, and takes BatchNorm's statistics from one training forward.

    A model that cannot train on the inputs alone (detectors need targets) keeps its statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))]
    for norm in norms:
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        if norm.bias is not None:
            nn.init.normal_(norm.bias, 0, 0.1)
    moments = {norm: norm.momentum for norm in norms if isinstance(norm, _BatchNorm)}
    for norm in moments:
        norm.momentum = 1.0
    with torch.no_grad(), contextlib.suppress(Exception):
        model.train()(*inputs)
    for norm, moment in moments.items():
        norm.momentum = moment
    model.eval()
