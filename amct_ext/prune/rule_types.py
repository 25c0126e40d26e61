"""What the rules of channel propagation have in common: a rule's type, and how it says that it cannot follow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from amct_ext.graph.values import Node, Value
from amct_ext.prune.groups import Layout

Layouts = Sequence[Layout | None]
Rule = Callable[[Node, Layouts], Layout | None]


class CannotFollow(Exception):  # noqa: N818 - a signal between rule and caller, no error
    """The channels cannot be followed through this node; str() says why."""


def on_first_input(rule: Callable[[Node, Value, Layout], Layout]) -> Rule:
    """The rule for ops whose input 0 carries the channels; no other input may carry any."""

    @functools.wraps(rule)
    def follow(node: Node, layouts: Layouts) -> Layout | None:
        value, layout = node.inputs[0], layouts[0]
        if any(other is not None for other in layouts[1:]):
            raise CannotFollow(f"{node.name} ({node.op}) takes channels at a second input")
        return None if value is None or layout is None else rule(node, value, layout)

    return follow
