"""BatchNorm of fixed statistics folded into the convolution before it, as the device computes it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from amct_ext.common.layer_kinds import CONVS, keeps_forward, layer_type
from amct_ext.errors import ExportError


def fold_batchnorms(model: nn.Module, conv_bn: Mapping[str, str], recorded: set[str]) -> dict[str, np.ndarray]:
    """Fold each BatchNorm of ``conv_bn`` (convolution -> BatchNorm) into its convolution, in place.

    Returns for each folded convolution with a learned factor a bool array of shape (out_channels,): where the factor
    is negative. Where folding is impossible the pair stays as it is, unless the convolution is in ``recorded``: its
    scales contain the BatchNorm factor, so nothing right could be written. SyncBatchNorm folds like any other; where
    one stays it computes what BatchNorm does, since the model is in eval mode. Errors: ExportError.
    """
    modules = dict(model.named_modules())
    mirrored = {}
    for conv_name, bn_name in conv_bn.items():
        conv, bn = modules.get(conv_name), modules.get(bn_name)
        if not isinstance(conv, _ConvNd) or layer_type(conv) not in CONVS or not isinstance(bn, _BatchNorm):
            raise ExportError(f"{conv_name!r} and {bn_name!r} are no convolution and BatchNorm of this model")
        problem = _fold(conv, bn)
        if problem is None:
            for norm in [bn, *_aliases(bn, modules, conv_bn)]:
                # the object, for it may be reached by several names
                vars(norm)["forward"] = _identity if keeps_forward(norm) else functools.partial(_without_norm, norm)
            if bn.weight is not None:
                mirrored[conv_name] = (bn.weight < 0).cpu().numpy()
        elif conv_name in recorded:
            raise ExportError(f"{bn_name!r} cannot be folded into the quantised layer {conv_name!r}: {problem}")
    return mirrored


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


class _NoNorm(TorchFunctionMode):
    """While it is on, normalising by the statistics of one module hands on the input as it is."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._norm = norm

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, torch.batch_norm):
            place = 1 if func is F.batch_norm else 3
            mean = args[place] if len(args) > place else kwargs.get("running_mean")
            if mean is self._norm.running_mean:
                return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _without_norm(norm: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the forward of a class of the user's own does beside the normalisation: an activation, say."""
    with _NoNorm(norm):
        return type(norm).forward(norm, *args, **kwargs)


def _aliases(bn: _BatchNorm, modules: Mapping[str, nn.Module], conv_bn: Mapping[str, str]) -> list[nn.Module]:
    """Modules with the very statistics of `bn`: a conversion (to SyncBatchNorm) makes one for each name it has."""
    paired = set(conv_bn.values())
    return [
        module
        for name, module in modules.items()
        if isinstance(module, _BatchNorm) and module.running_var is bn.running_var and name not in paired
    ]


def _fold(conv: _ConvNd, bn: _BatchNorm) -> str | None:
    """Put `bn` into `conv`; the reason where that is impossible."""
    if bn.running_mean is None or bn.running_var is None:
        return "it keeps no running statistics"
    weight, bias = nn.utils.fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        return "the folded weight or bias would hold NaN or Inf"
    conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return None
