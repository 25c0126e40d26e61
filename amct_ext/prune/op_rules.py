"""How channels pass through ops: for each op that channel removal can follow, the rule that gives its outputs' layouts.

A rule takes the node and the layouts of its inputs (None: channels that are not ours to remove) and returns the layout
of the outputs, or None. A rule that cannot follow raises CannotFollow with the reason; the groups that came in freeze.
"""

from __future__ import annotations

import re

from amct_ext.graph.values import Node
from amct_ext.prune import shape_rules
from amct_ext.prune.join_rules import concatenate, elementwise, stack
from amct_ext.prune.rule_types import Rule

# Elementwise ops that torch (some versions, or for the in-place form) does not tag as such, and ops that only take the
# shape of their input.
_ELEMENTWISE = {
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "hardsigmoid",
    "hardtanh",
    "hardswish",
    "log_sigmoid_forward",
    "_prelu_kernel",
    "_to_copy",
    "native_dropout",
    "bernoulli",
    "fill",
    "zero",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
}
_SPATIAL = re.compile(
    r"(_?adaptive_)?(max|avg)_pool[123]d(_with_indices)?$|upsample_\w+[123]d$|_upsample_\w+[123]d(_aa)?$"
    r"|(reflection|replication)_pad[123]d$|grid_sampler_[23]d$"
)
_RULES: dict[str, Rule] = {
    "cat": concatenate,
    "stack": stack,
    "permute": shape_rules.permute,
    "transpose": shape_rules.permute,
    "t": shape_rules.permute,
    "constant_pad_nd": shape_rules.pad,
    "expand": shape_rules.expand,
    "native_layer_norm": shape_rules.layer_norm,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"), shape_rules.reshape),
    **dict.fromkeys(
        (
            "select",
            "slice",
            "split",
            "split_with_sizes",
            "unbind",
            "flip",
            "roll",
            "mean",
            "sum",
            "amax",
            "amin",
            "max",
            "min",
            "prod",
            "var",
            "std",
            "var_mean",
            "linalg_vector_norm",
            "logsumexp",
            "argmax",
            "argmin",
            "cumsum",
            "sort",
            "_softmax",
            "_log_softmax",
        ),
        shape_rules.along_dims,
    ),
}


def op_rule(node: Node) -> Rule | None:
    """The rule for an op, None where it is not known."""
    if node.op in _RULES:
        return _RULES[node.op]
    if node.pointwise or node.op in _ELEMENTWISE:
        return elementwise
    if _SPATIAL.match(node.op):
        return shape_rules.spatial
    return None
