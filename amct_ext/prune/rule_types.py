"""What the rules of channel propagation have in common: a rule's type, and how it says that it cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amct_ext.graph.values import Node, Value
from amct_ext.prune.groups import Layout

Layouts = Sequence[Layout | None]
Rule = Callable[[Node, Layouts], Layout | None]


class CannotFollow(Exception):  # noqa: N818 - a signal between rule and caller, no error
    """The channels cannot be followed through this node; str() says why."""


def only_first(node: Node, layouts: Layouts) -> tuple[Value, Layout] | None:
    """Input 0 with its layout; other inputs must not carry channels."""
    value, layout = node.inputs[0], layouts[0]
    if any(other is not None for other in layouts[1:]):
        raise CannotFollow(f"{node.name} ({node.op}) takes channels at a second input")
    return None if value is None or layout is None else (value, layout)
