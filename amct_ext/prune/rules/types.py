"""What the rules of channel propagation have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.coupling import Coupling

Maps = tuple[ChannelMap, ...]


class CannotFollow(Exception):  # noqa: N818 - a signal between rule and caller, no error
    """The channels cannot be followed through this node; str() says why."""


class LayerLookup(Protocol):
    """What rules ask about the layers that parameters belong to."""

    def input_ids(self, weight: Value, size: int) -> Tensor | None:
        """Ids of the input channels of a grouped convolution's weight; None where the weight is no layer's."""

    def mark_produced(self, node: Node, weight: Value, ids: Tensor) -> None:
        """The node's output channels are rows of this weight: those of a layer that the plan may prune."""

    def mark_read(self, node: Node, parameter: Value, ids: Tensor, num_groups: int | None = None) -> None:
        """The node reads channels by a layer's parameter."""

    def can_scale_output(self, node: Node) -> bool:
        """Whether the output channels of a layer's call may be multiplied by way of its weight and bias."""


@dataclass(frozen=True)
class Context:
    """State of the walk that rules use: the channel maps so far, and what is known about ids."""

    coupling: Coupling
    layers: LayerLookup
    maps: dict[Value, Maps] = field(default_factory=dict)

    def of(self, value: object) -> Maps:
        """The channels in a value; () for what stays, and for arguments that are no tensor."""
        return self.maps.get(value, ()) if isinstance(value, Value) else ()


# The channels in each output, by number; outputs that are left out have none.
Rule = Callable[[Node, Context], Mapping[int, Maps]]


def dims_of(node: Node, dims: int) -> set[int]:
    """The axes that an op with argument dim, dims or axis works along; all where none is given."""
    given = next((node.args[name] for name in ("dims", "dim", "axis") if node.args.get(name) is not None), None)
    listed: Sequence[int] = (
        list(range(dims)) if given is None or given == [] else given if isinstance(given, list) else [given]
    )
    return {axis % dims for axis in listed} if dims else set()
