"""DistributedDataParallel and torch.compile wrappers taken off a model; the former put back."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


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

    A fresh wrapper: the old one's gradient buckets do not know the new parameters. That of torch.compile is left off.
    """
    while hasattr(original, "_orig_mod"):
        original = original._orig_mod  # type: ignore[assignment]
    if not isinstance(original, DistributedDataParallel):
        return model
    wrapped = DistributedDataParallel(
        model,
        device_ids=original.device_ids,
        output_device=original.output_device,
        dim=original.dim,
        broadcast_buffers=original.broadcast_buffers,
        process_group=original.process_group,
        find_unused_parameters=original.find_unused_parameters,
        gradient_as_bucket_view=original.gradient_as_bucket_view,
        static_graph=original.static_graph,
    )
    wrapped.train(original.training)
    return wrapped
