"""Importance of a group's channels from the weights that make, scale and read them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import LayerFamily, is_depthwise, kind_of, output_axis
from amct_ext.errors import InvalidDataError
from amct_ext.ops import filter_norms
from amct_ext.prune.groups import ChannelGroup, Member
from amct_ext.prune.removal import LAYER_OPERATORS


def group_norms(group: ChannelGroup, model: nn.Module) -> Tensor:
    """Importance of each channel of a group: the sum of its L2 norms in all members: float64.

    Members are the producers' filters, BatchNorm's factors, the filters of depthwise convolutions, and the slices of
    the weights that read the channel. A member's norms are divided by their mean over the channels, so that members
    of different size count equally; all-zero members are skipped. Errors: InvalidDataError (NaN or Inf). Source: after
    DepGraph's group norm (Fang et al. 2023), which sums squares and does not divide them.
    """
    total = torch.zeros(group.count, dtype=torch.float64)
    for norms in _norms(group, model):
        mean = norms.mean()
        if bool(mean > 0):
            total += norms / mean
    return total


def _norms(group: ChannelGroup, model: nn.Module) -> Iterator[Tensor]:
    """Each member's norms, on the CPU; a BatchNorm without factors is none."""
    for member in group.producers:
        yield filter_norms(produced_rows(member, group.count, model)).cpu().double()
    for member in group.consumers:
        module = model.get_submodule(member.name) if member.type in LAYER_OPERATORS else None
        if module is not None and getattr(module, "weight", None) is not None:
            norms = filter_norms(by_input(finite_weight(member, model), module)).cpu().double()
            yield member.summed(norms.square(), group.count).sqrt()


def produced_rows(member: Member, count: int, model: nn.Module) -> Tensor:
    """What a producer makes a group's channels by: its weight with these along axis 0. Errors: InvalidDataError."""
    rows = finite_weight(member, model).movedim(output_axis(model.get_submodule(member.name)), 0)
    if len(rows) == count:
        return rows
    return rows[member.begin : member.begin + count * member.repeat].reshape(count, -1)


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
    if kind.family is LayerFamily.CONV and groups > 1:
        return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.movedim(kind.weight_axes[0], 0)
