"""Which BatchNorm follows a compressed convolution: its factor belongs to the recorded weight scales."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_ext.layers.compressed import CompressedLayer
from amct_ext.model_surgery.lookup import layers_by_created_name


def link_batchnorms(model: nn.Module, pairs: Mapping[str, str]) -> dict[str, str]:
    """Point convolutions to the BatchNorm modules that follow them now; returns the pairs, by present names, that are.

    A BatchNorm may have been exchanged since create: by SyncBatchNorm, which folds like any other, or by something that
    stays behind the convolution as it is (Identity after a fusion by hand, FrozenBatchNorm).
    """
    modules = dict(model.named_modules())
    placed = layers_by_created_name(model)
    present = {}
    for conv, norm in pairs.items():
        if conv in placed:
            name, layer = placed[conv]
            follower = modules.get(norm)
            layer.set_batch_norm(follower if follower is not None and foldable(follower) else None)
            if layer.refs.batch_norm is not None:
                present[name] = norm
    return present


def batchnorms_linked(model: nn.Module, pairs: Mapping[str, str]) -> bool:
    """Whether `link_batchnorms` has nothing to change, found in a fraction of its time.

    False also where a layer has moved.
    """
    for conv, norm in pairs.items():
        layer, follower = _submodule(model, conv), _submodule(model, norm)
        if not isinstance(layer, CompressedLayer) or layer.layer_name != conv:
            return False
        if layer.refs.batch_norm is not (follower if follower is not None and foldable(follower) else None):
            return False
    return True


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    """``get_submodule`` by registered modules alone; None where there is none of that name."""
    module: nn.Module | None = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def foldable(norm: nn.Module) -> bool:
    """Whether a module is a BatchNorm that normalises by fixed statistics in evaluation."""
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
