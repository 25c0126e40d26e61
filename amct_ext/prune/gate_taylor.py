"""Importance of channels by the loss: its first-order change when a channel is switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import BATCH_NORMS, is_depthwise, kind_of, layer_type
from amct_ext.common.ranks import all_reduce_mean_
from amct_ext.errors import InputDataError, InvalidDataError
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.removal import LAYER_OPERATORS

PruningLoss = Callable[[nn.Module], Iterable[Tensor]]  # given the float model, one scalar loss per batch


def gate_taylor(model: nn.Module, groups: Sequence[ChannelGroup], pruning_loss: PruningLoss) -> list[Tensor]:
    """Absolute change of the loss per channel of each group, first order, summed over a batch, mean over batches.

    One gate per channel multiplies the input of every layer that reads it (after BatchNorm, activation, addition). Axis
    0 counts as samples, each with its own gates; if consumers of a group see different sizes of axis 0, gates are
    summed over the batch. In a distributed job the mean is that of all ranks, which must all call this. No parameter of
    `model` requires gradients afterwards; no `grad` is written. Returns: float64. Errors: InputDataError (no loss, not
    a finite scalar, independent of the model), InvalidDataError (gradients). Source: Molchanov et al. 2019, Taylor
    expansion at gates.
    """
    model.requires_grad_(False)
    device = next(model.parameters()).device
    totals = [torch.zeros(group.count, dtype=torch.float64, device=device) for group in groups]
    count = 0
    with torch.enable_grad(), _gated(model, _readers(model, groups)) as gates:
        losses = pruning_loss(model)
        if isinstance(losses, Tensor) or not isinstance(losses, Iterable):
            raise InputDataError(
                f"losses must come one by one, from a generator or list, not as {type(losses).__name__}"
            )
        for loss in losses:
            count += 1
            _check_loss(loss, count)
            gradients = _gate_gradients(loss, gates, count)
            for total, group in zip(totals, groups, strict=True):
                total += _changes(group, gradients).to(device).abs().sum(0)
    if not count:
        raise InputDataError("there is no loss: one per batch is needed to rank channels by")
    means = [total / count for total in totals]
    all_reduce_mean_(means)
    for mean, group in zip(means, groups, strict=True):
        if not bool(torch.isfinite(mean).all()):
            raise InvalidDataError(f"{group.producers[0].name}: the loss's gradient holds NaN or Inf there")
    return means


def _readers(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, nn.Module]:
    """The layers that channels end in: no addition, BatchNorm or depthwise convolution, which pass them on."""
    modules = dict(model.named_modules())
    found = {m.name: modules[m.name] for group in groups for m in group.consumers if m.type in LAYER_OPERATORS}
    passing = {name for name, module in found.items() if layer_type(module) in BATCH_NORMS or is_depthwise(module)}
    return {name: module for name, module in found.items() if name not in passing}


@contextlib.contextmanager
def _gated(model: nn.Module, readers: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """Factors of one on what the readers are given; the list gets each with its layer's name, as forwards run."""
    gates: list[tuple[str, Tensor]] = []

    def hook(name: str, axis: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        def open_gate(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not torch.is_grad_enabled():  # a teacher, say
                return None
            x = args[0] if args else kwargs["input"]
            kept = {0, axis % x.dim()}
            gate = x.new_ones([size if i in kept else 1 for i, size in enumerate(x.shape)]).requires_grad_()
            gates.append((name, gate))
            return ((x * gate, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x * gate})

        return open_gate

    with contextlib.ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN has no backward of recurrent layers in eval mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        for name, module in readers.items():
            kind = kind_of(module)
            assert kind is not None
            handle = module.register_forward_pre_hook(hook(name, kind.channel_axis), with_kwargs=True)
            stack.callback(handle.remove)
        yield gates


def _gate_gradients(loss: Tensor, gates: list[tuple[str, Tensor]], number: int) -> list[tuple[str, Tensor]]:
    """Gradients (samples, channels) in float64 of the gates that a loss passed, which leave the list."""
    try:
        gradients = torch.autograd.grad(loss, [gate for _, gate in gates], allow_unused=True) if gates else ()
    except RuntimeError as error:
        raise InputDataError(f"loss {number} cannot be differentiated: {error}") from error
    passed = [
        (name, gradient.double().reshape(-1, gradient.numel() // gradient.shape[0]))
        for (name, _), gradient in zip(gates, gradients, strict=True)
        if gradient is not None
    ]
    if not passed:
        raise InputDataError(
            f"loss {number} depends on no layer that is pruned: compute it by a forward of its own of the model given"
        )
    gates[:] = [gate for gate, gradient in zip(gates, gradients, strict=True) if gradient is None]
    return passed


def _changes(group: ChannelGroup, gradients: Sequence[tuple[str, Tensor]]) -> Tensor:
    """What the gates of a group, one per sample, change: (samples or 1, channels)."""
    parts = []
    for member in group.consumers:
        for name, gradient in gradients:
            if name == member.name:
                parts.append(member.summed(gradient, group.count))
    if not parts:  # this loss does not depend on the group
        return torch.zeros(1, group.count)
    if len({len(part) for part in parts}) > 1:
        parts = [part.sum(0, keepdim=True) for part in parts]
    device = parts[0].device
    return torch.stack([part.to(device) for part in parts]).sum(0)


def _check_loss(loss: object, number: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputDataError(f"loss {number} must be a tensor with one number, not {seen}")
    if not loss.requires_grad:
        raise InputDataError(f"loss {number} has no gradient: compute it from the model given, without torch.no_grad")
    if not bool(torch.isfinite(loss)):
        raise InputDataError(f"loss {number} is NaN or Inf: check data, labels and weights")
