"""The rule of each op that channel ids can be followed through. At any other op channels stay."""

from __future__ import annotations

import re

from amct_ext.graph.operators import (
    ATTENTIONS,
    BATCH_NORM_OPS,
    GROUP_NORM,
    LAYER_NORMS,
    MATRIX_PRODUCTS,
    SOFTMAXES,
    STATISTICS,
)
from amct_ext.graph.values import Node
from amct_ext.prune.rules import attention, elementwise, movement, norms, products, reduction
from amct_ext.prune.rules.types import Rule

# Elementwise ops that torch (some versions, or for the in-place form) does not tag as such.
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
    "copy",
    "native_dropout",
    "bernoulli",
    "fill",
    "zero",
}
_SPATIAL = re.compile(
    r"(_?adaptive_)?(max|avg)_pool[123]d(_with_indices)?$|upsample_\w+[123]d$|_upsample_\w+[123]d(_aa)?$"
    r"|(reflection|replication)_pad[123]d$|grid_sampler_[23]d$"
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
                    movement.same_channels),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), movement.no_channels),
    "overwritten_part": movement.partial_write,
    # elements move
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"), movement.reshape),
    **dict.fromkeys(("permute", "transpose", "t"), movement.permute),
    **dict.fromkeys(("split", "split_with_sizes"), movement.split),
    **dict.fromkeys(("select", "unbind"), movement.select),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), movement.pixel_shuffle),
    "as_strided": movement.as_strided,
    "slice": movement.slice_,
    "expand": movement.expand,
    "repeat": movement.repeat,
    "flip": movement.flip,
    "roll": movement.roll,
    "constant_pad_nd": movement.pad,
    "channel_shuffle": movement.channel_shuffle,
    "glu": movement.glu,
    "cat": elementwise.concatenate,
    "stack": elementwise.stack,
    # along axes
    **dict.fromkeys(STATISTICS, reduction.statistic),
    **dict.fromkeys(("max", "min", "prod", "logsumexp", "argmax", "argmin", "cumsum", "sort"), reduction.along_dims),
    **dict.fromkeys(SOFTMAXES, reduction.softmax),
    # normalisations
    **dict.fromkeys(LAYER_NORMS, norms.layer_norm),
    GROUP_NORM: norms.group_norm,
    **dict.fromkeys(BATCH_NORM_OPS, norms.batch_norm),
    # products
    **dict.fromkeys(MATRIX_PRODUCTS, products.matrix_product),
    "convolution": products.convolution,
    "embedding": products.embedding,
    **dict.fromkeys(ATTENTIONS, attention.attention),
}  # fmt: skip


def op_rule(node: Node) -> Rule | None:
    """The rule for an op, None where it is not known."""
    if node.op in _RULES:
        return _RULES[node.op]
    if node.pointwise or node.op in _ELEMENTWISE:
        return elementwise.elementwise
    if _SPATIAL.match(node.op):
        return reduction.spatial
    return None
