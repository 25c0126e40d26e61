"""Importance of a group's channels from the weights that make, scale and read them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import BATCH_NORMS, Family, is_depthwise, kind_of, layer_type
from amct_ext.errors import InvalidDataError
from amct_ext.ops import filter_norms
from amct_ext.prune.groups import ChannelGroup, Member
from amct_ext.prune.removal import LAYER_OPERATORS


def group_norms(group: ChannelGroup, model: nn.Module) -> Tensor:
    """Importance of each channel of a group: mean over its members of the squared L2 norm there: float64.

    Members are BatchNorm's factors, the filters of depthwise convolutions, the slices of the weights that read the
    channel, and the producers' filters. The latter have no say where a BatchNorm reads the channels, for it divides
    their scale out again. Each member is divided by its mean over the channels, so that none speaks louder by its size;
    one that is zero throughout has no say. Errors: InvalidDataError (NaN or Inf). Source: after DepGraph's group norm
    (Fang et al. 2023), which counts all members and does not divide them.
    """
    members = list(_members(group, model))
    kept = [squares for role, squares in members if role != "producer"]
    if not any(role == "norm" for role, _ in members):
        kept = [squares for _, squares in members]
    total = torch.zeros(group.count, dtype=torch.float64)
    for squares in kept:
        mean = squares.mean()
        if bool(mean > 0):
            total += squares / mean
    return total / len(kept)


def _members(group: ChannelGroup, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each member that has weights: 'producer', 'norm' or 'reader', and its squared norms on the CPU."""
    for member in group.producers:
        yield "producer", filter_norms(finite_weight(member, model)).cpu().double().square()
    for member in group.consumers:
        module = model.get_submodule(member.name) if member.type in LAYER_OPERATORS else None
        if module is not None and getattr(module, "weight", None) is not None:  # a BatchNorm may have no factors
            norms = filter_norms(by_input(finite_weight(member, model), module)).cpu().double()
            places = norms[member.begin : member.begin + group.count * member.repeat]
            role = "norm" if layer_type(module) in BATCH_NORMS else "reader"
            yield role, places.square().reshape(group.count, member.repeat).sum(1)


def finite_weight(member: Member, model: nn.Module) -> Tensor:
    """A member's weight, detached. Errors: InvalidDataError."""
    weight = model.get_parameter(f"{member.name}.weight").detach()
    if not bool(torch.isfinite(weight).all()):
        raise InvalidDataError(f"{member.name}: the weight holds NaN or Inf, so its channels cannot be ranked")
    return weight


def by_input(weight: Tensor, module: nn.Module) -> Tensor:
    """A weight (or its gradient) with the layer's input channels along axis 0, whatever its groups."""
    kind, groups = kind_of(module), int(getattr(module, "groups", 1))
    assert kind is not None  # readers of channels are layers
    if is_depthwise(module):
        return weight.reshape(groups, -1)
    if kind.family is Family.CONV and groups > 1:
        return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.movedim(kind.weight_axes[0], 0)
