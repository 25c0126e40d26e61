"""Importance of channels by the loss: its first-order change when a channel is switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import BATCH_NORMS, is_depthwise, layer_type
from amct_ext.common.ranks import average_
from amct_ext.errors import InputDataError, InvalidDataError
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.importance import by_input
from amct_ext.prune.removal import LAYER_OPERATORS

PruningLoss = Callable[[nn.Module], Iterable[Tensor]]  # given the float model, one scalar loss per batch


def gate_taylor(model: nn.Module, groups: Sequence[ChannelGroup], losses: Iterable[Tensor]) -> list[Tensor]:
    """Absolute change of the loss per channel of each group, first order, mean over `losses`: float64.

    `losses`: scalars computed from `model`, one per batch. The gate of a channel is a factor on it in front of every
    layer that reads it, as removal switches it off: behind BatchNorm, activations, depthwise convolutions, additions.
    Its gradient is the sum of weight * gradient over the slices of those layers' weights. In a distributed job the mean
    is that of all ranks, which must all call this. Afterwards those weights alone require gradients; no `grad` is
    written. Errors: InputDataError (no loss, not a finite scalar, independent of the model), InvalidDataError
    (gradients). Source: Molchanov et al. 2019, Taylor expansion at gates.
    """
    if isinstance(losses, Tensor) or not isinstance(losses, Iterable):
        raise InputDataError(f"losses must come one by one, from a generator or list, not as {type(losses).__name__}")
    readers = _readers(model, groups)
    model.requires_grad_(False)
    weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in readers]
    device = weights[0].device if weights else torch.device("cpu")
    totals = [torch.zeros(group.count, dtype=torch.float64, device=device) for group in groups]
    count = 0
    with torch.enable_grad():
        for loss in losses:
            count += 1
            _check_loss(loss, count)
            try:
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            except RuntimeError as error:
                raise InputDataError(f"loss {count} cannot be differentiated: {error}") from error
            if all(gradient is None for gradient in gradients):
                raise InputDataError(
                    f"loss {count} depends on no layer that is pruned; compute it from the model given"
                )
            places = {
                name: _by_place(weight.detach() * gradient, module).to(device)
                for (name, module), weight, gradient in zip(readers.items(), weights, gradients, strict=True)
                if gradient is not None  # else the layer does not matter to this loss
            }
            for total, group in zip(totals, groups, strict=True):
                total += _gate_gradient(group, places, device).abs()
    if not count:
        raise InputDataError("there is no loss: one per batch is needed to rank channels by")
    means = [total / count for total in totals]
    average_(means)
    for mean, group in zip(means, groups, strict=True):
        if not bool(torch.isfinite(mean).all()):
            raise InvalidDataError(f"{group.producers[0].name}: the loss's gradient holds NaN or Inf there")
    return means


def _readers(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, nn.Module]:
    """The layers that channels end in: no addition, BatchNorm or depthwise convolution, which pass them on."""
    modules = dict(model.named_modules())
    found = {m.name: modules[m.name] for group in groups for m in group.consumers if m.type in LAYER_OPERATORS}
    return {
        name: module
        for name, module in found.items()
        if layer_type(module) not in BATCH_NORMS and not is_depthwise(module)
    }


def _by_place(products: Tensor, module: nn.Module) -> Tensor:
    """weight * gradient summed over everything but the layer's input channels."""
    return by_input(products, module).flatten(1).sum(1, dtype=torch.float64)


def _gate_gradient(group: ChannelGroup, places: dict[str, Tensor], device: torch.device) -> Tensor:
    """Gradient of one loss with respect to the gates of a group."""
    total = torch.zeros(group.count, dtype=torch.float64, device=device)
    for member in group.consumers:
        if member.name in places:
            own = places[member.name][member.begin : member.begin + group.count * member.repeat]
            total += own.reshape(group.count, member.repeat).sum(1)
    return total


def _check_loss(loss: object, number: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputDataError(f"loss {number} must be a tensor with one number, not {seen}")
    if not loss.requires_grad:
        raise InputDataError(f"loss {number} has no gradient: compute it from the model given, without torch.no_grad")
    if not bool(torch.isfinite(loss)):
        raise InputDataError(f"loss {number} is NaN or Inf: check data, labels and weights")
