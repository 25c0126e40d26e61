"""Sizes that change when channels are removed: shapes in the forward, and attributes of modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import kind_of
from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.discovery import Discovery

# Attributes that hold numbers of channels, in torch's modules and in common libraries. Others are never changed.
SIZE_ATTRIBUTES = frozenset(
    (
        "normalized_shape", "num_channels", "num_features", "num_parameters",  # norms and PReLU of torch
        "head_dim", "key_dim", "dim_head", "head_size", "attention_head_size", "all_head_size", "inner_dim",
        "embed_dim", "hidden_size", "hidden_dim", "d_model", "d_head", "attn_dim", "split_size", "dim", "channels", "c",
        "in_channels", "out_channels", "num_filters", "split_indexes", "dim_conv3", "dim_untouched",
        "expand_chs", "splits", "input_split", "nh_kd", "val_dim", "out_dim", "width", "num_chs", "sizes",
        "key_value_proj_dim", "split_sizes", "shape", "proj_view_shape", "val_attn_dim", "key_attn_dim", "rotary_ndims",
    )
)  # fmt: skip
# Ops that are given sizes. Others take them from their inputs.
_OPS_TAKING_SIZES = frozenset(
    (
        "view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "expand", "repeat", "split",
        "split_with_sizes", "slice", "native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm",
        "_prelu_kernel",
    )
)  # fmt: skip
_SIZE_OF_OWN_PARAMETER = frozenset(("normalized_shape", "num_channels", "num_parameters", "embedding_dim"))
SPLITS = ("split", "split_with_sizes")
Resized = list[tuple[tuple[int, ...], tuple[int, ...]]]  # shapes before and after
_MAX_SCOPES = 3  # modules around an op, from the innermost on, whose attributes it may take sizes from


def keep_mask(channel_map: ChannelMap, removed_mask: Tensor) -> Tensor:
    """Which indices stay: bool, shaped like channel_map.ids."""
    return ~removed_mask[channel_map.ids]


def expected_shape(value: Value, discovery: Discovery, removed_mask: Tensor) -> tuple[int, ...]:
    """The shape of a value after removal. Rows that lose different numbers give -1."""
    shape = list(value.shape)
    for item in discovery.maps.get(value, ()):
        if item.ids.shape[item.axis] == shape[item.axis]:
            counts = keep_mask(item, removed_mask).sum(item.axis).unique()
            shape[item.axis] = int(counts) if len(counts) == 1 else -1
    return tuple(shape)


def changed_attributes(model: nn.Module, discovery: Discovery, removed_mask: Tensor) -> dict[tuple[str, str], object]:
    """New values of size attributes, by module and attribute.

    The op nearest to the module decides. On conflicting values at the same distance the attribute is not changed.
    """
    modules = dict(model.named_modules())
    wanted: dict[tuple[str, str], tuple[int, object]] = {}
    conflicting: set[tuple[str, str]] = set()
    trained = discovery.graph.training
    for node in (*discovery.graph.nodes, *(trained.nodes if trained is not None else ())):
        shapes = _changed_shapes(node, discovery, removed_mask) if _takes_sizes(node, modules) else []
        if not shapes:
            continue
        changes = dict(_changes(node, shapes, discovery, removed_mask))
        for distance, name in enumerate(scopes_of(node.scope)):
            for attribute, value in vars(modules[name]).items():
                new = _replaced(value, changes, shapes) if attribute in SIZE_ATTRIBUTES else None
                if new is None:
                    continue
                key = (name, attribute)
                nearest, before = wanted.get(key, (_MAX_SCOPES, new))
                if distance < nearest:
                    conflicting.discard(key)
                    wanted[key] = (distance, new)
                elif distance == nearest and new != before:
                    conflicting.add(key)
    sizes = {key: value for key, (_, value) in wanted.items() if key not in conflicting}
    return sizes | dict(_of_own_parameters(modules, discovery, removed_mask))


def _of_own_parameters(
    modules: Mapping[str, nn.Module], discovery: Discovery, removed_mask: Tensor
) -> Iterator[tuple[tuple[str, str], object]]:
    """Attributes that say the size of a parameter that their module holds itself: of norms, PReLU, embeddings."""
    shapes: dict[str, list[int]] = {}
    for source, ids in discovery.axis_ids.items():
        if source.axis is not None and bool(removed_mask[ids].any()):
            owner, _, key = source.name.rpartition(".")
            if key == "weight":
                shape = shapes.setdefault(owner, list(_weight(modules[owner]).shape))
                shape[source.axis] = int((~removed_mask[ids]).sum())
    for owner, shape in shapes.items():
        old = list(_weight(modules[owner]).shape)
        for attribute in _SIZE_OF_OWN_PARAMETER & vars(modules[owner]).keys():
            value = vars(modules[owner])[attribute]
            if isinstance(value, (tuple, list)) and list(value) == old:
                yield (owner, attribute), type(value)(shape)
            elif value == old[-1] != shape[-1] and isinstance(value, int):
                yield (owner, attribute), shape[-1]


def _takes_sizes(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an op takes sizes as arguments. A convolution does: its groups; those of a layer are cut with it."""
    return node.op in _OPS_TAKING_SIZES or (node.op == "convolution" and kind_of(modules[node.scope]) is None)


def scopes_of(scope: str) -> list[str]:
    """A module and those around it whose attributes its operators may take sizes from, the nearest first."""
    parts = scope.split(".") if scope else []
    return [".".join(parts[:count]) for count in range(len(parts), max(-1, len(parts) - _MAX_SCOPES), -1)]


def _changed_shapes(node: Node, discovery: Discovery, removed_mask: Tensor) -> Resized:
    """Shapes of what a node reads and makes that change: old and new; -1 where rows lose different numbers."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and discovery.maps.get(value)]
    shapes = [(value.shape, expected_shape(value, discovery, removed_mask)) for value in values]
    if node.op in SPLITS:
        dim = node.args["dim"] % len(node.outputs[0].shape)
        sizes = [(value.shape[dim], expected_shape(value, discovery, removed_mask)[dim]) for value in node.outputs]
        shapes.insert(0, (tuple(old for old, _ in sizes), tuple(new for _, new in sizes)))
    return [(old, new) for old, new in shapes if old != new]


def _changes(node: Node, shapes: Resized, discovery: Discovery, removed_mask: Tensor) -> Iterator[tuple[int, int]]:
    """Sizes that a node is given or works on: old and new."""
    for old, new in shapes:
        yield from ((a, b) for a, b in zip(old, new, strict=True) if a != b and b >= 0)
        trailing = [(math.prod(old[i:]), math.prod(new[i:])) for i in range(len(new)) if -1 not in new[i:]]
        yield from ((a, b) for a, b in trailing if a != b)
    source = node.inputs[0] if node.inputs else None
    if node.op == "slice" and source is not None:
        dim = node.args["dim"] % len(source.shape)
        for item in discovery.maps.get(source, ()):
            if item.axis == dim:
                stay = keep_mask(item, removed_mask).movedim(dim, -1).reshape(-1, item.ids.shape[dim])[0].cumsum(0)
                for edge in (node.args["start"], node.args["end"]):
                    if isinstance(edge, int) and 0 < edge <= len(stay):
                        yield edge, int(stay[edge - 1])


def _replaced(value: object, changes: dict[int, int], shapes: Resized) -> object:
    """A size or sizes with those that change replaced; None where none does."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return changes.get(value)
    if not isinstance(value, (tuple, list)) or not value or not all(type(item) is int for item in value):
        return None
    if isinstance(value, torch.Size):
        return None
    sizes = tuple(value)
    for old, new in shapes:  # a part of a shape (normalized_shape): two of its sizes may be equal, and one change
        if len(sizes) <= len(old) and old[len(old) - len(sizes) :] == sizes:
            part = new[len(old) - len(sizes) :]
            return type(value)(part) if part != sizes and -1 not in part else None
    replaced = [changes.get(item, item) for item in sizes]
    return type(value)(replaced) if replaced != list(sizes) else None


def _weight(module: nn.Module) -> Tensor:
    """A weight that may be a buffer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
