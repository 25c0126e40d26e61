"""Physical removal of channels from layers: new parameters and buffers, attributes to match, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import BATCH_NORM_TENSORS, LAYER_KINDS, LayerFamily, LayerKind, is_depthwise, kind_of
from amct_ext.prune.groups import INITIALIZER
from amct_ext.record.types import ChannelRecord

# ONNX operators of layers; a consumer of another type (Add, Concat, ...) has no parameters to remove.
LAYER_OPERATORS = frozenset(operator for kind in LAYER_KINDS if kind.input_prunable for operator in kind.onnx)


class Removal:
    """All removals of some records, made at once: a layer that several records touch is rebuilt once per axis.

    `sizes`: attributes of modules that hold a size which changes with them, by module and attribute. `multipliers`:
    along axis 0 of parameters, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        records: Iterable[ChannelRecord],
        sizes: Mapping[tuple[str, str], object] = MappingProxyType({}),
        multipliers: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._modules = dict(model.named_modules())
        self._sizes, self._multipliers = sizes, multipliers
        self._initializers: dict[tuple[str, int], set[int]] = {}
        self._outputs: dict[str, set[int]] = {}
        self._inputs: dict[str, set[int]] = {}
        self._undo: list[tuple[dict[str, Any], str, Any]] = []
        for record in records:
            for node in record.producers:
                self._outputs.setdefault(node.name, set()).update(node.prune_index)
            for node in record.consumers:
                if node.type in LAYER_OPERATORS:
                    self._inputs.setdefault(node.name, set()).update(node.prune_index)
                elif node.type == INITIALIZER:
                    self._initializers.setdefault((node.name, node.axis or 0), set()).update(node.prune_index)

    def scale(self, multipliers: Mapping[str, Tensor]) -> None:
        """Multiply parameters by these too, from the next `apply` on."""
        merged = dict(self._multipliers)
        for name, factor in multipliers.items():
            merged[name] = merged[name] * factor if name in merged else factor
        self._multipliers = merged

    def apply(self) -> str:
        """Remove the channels; returns what went wrong, '' for nothing."""
        for name, multipliers in self._multipliers.items():
            owner, _, key = name.rpartition(".")
            self._multiply(self._modules[owner], key, multipliers)
        # Inputs first: removing outputs would shift the blocks of a grouped convolution.
        for remove, all_indices in ((self._remove_input, self._inputs), (self._remove_output, self._outputs)):
            for name, indices in all_indices.items():
                if not indices:
                    continue
                try:
                    remove(self._modules[name], indices)
                except (RuntimeError, IndexError) as error:
                    return f"{name} cannot be cut: {error}"
        for (name, axis), indices in self._initializers.items():
            owner, _, key = name.rpartition(".")
            try:
                self._remove(self._modules[owner], key, axis, indices)
            except (RuntimeError, IndexError) as error:
                return f"{name} cannot be cut: {error}"
        for (name, attribute), value in self._sizes.items():
            self._set(self._modules[name], attribute, value)
        return ""

    def undo(self) -> None:
        """Bring back what was there before, the very same objects."""
        for holder, key, old in reversed(self._undo):
            holder[key] = old
        self._undo.clear()

    def _multiply(self, module: nn.Module, name: str, multipliers: Tensor) -> None:
        tensor = getattr(module, name, None)
        if tensor is not None:
            shaped = multipliers.to(tensor).reshape(-1, *[1] * (tensor.dim() - 1))
            self._replace(module, name, _like(tensor, tensor.detach() * shaped))

    def _remove_output(self, module: nn.Module, indices: set[int]) -> None:
        kind = _kind_of(module)
        self._remove(module, "weight", kind.weight_axes[1], indices)
        self._remove(module, "bias", 0, indices)
        self._decrease(module, kind.widths[1], len(indices))

    def _remove_input(self, module: nn.Module, indices: set[int]) -> None:
        kind = _kind_of(module)
        if is_depthwise(module):
            self._remove_depthwise(module, indices, kind.family is LayerFamily.TRANSPOSED_CONV)
        elif kind.family is LayerFamily.CONV:
            self._remove_convolution_input(module, indices)
        else:
            # Also of a transposed weight with groups: the input channels of its groups follow each other.
            for name in BATCH_NORM_TENSORS if kind.family is LayerFamily.BATCH_NORM else ("weight",):
                self._remove(module, name, kind.weight_axes[0], indices)
            self._decrease(module, kind.widths[0], len(indices))

    def _remove_depthwise(self, module: nn.Module, indices: set[int], transposed: bool) -> None:
        multiplier = int(getattr(module, "out_channels", 0)) // int(getattr(module, "in_channels", 1))
        outputs = {index * multiplier + copy for index in indices for copy in range(multiplier)}
        # A transposed weight is (in, multiplier, ...), a plain one (in * multiplier, 1, ...).
        self._remove(module, "weight", 0, indices if transposed else outputs)
        self._remove(module, "bias", 0, outputs)
        self._decrease(module, "in_channels", len(indices))
        self._decrease(module, "groups", len(indices))
        self._decrease(module, "out_channels", len(outputs))

    def _remove_convolution_input(self, module: nn.Module, indices: set[int]) -> None:
        weight, groups = module.get_parameter("weight"), int(getattr(module, "groups", 1))
        per_block = weight.shape[1]
        outputs = weight.shape[0] // groups
        blocks = []
        for block in range(groups):
            inside = {index - block * per_block for index in indices if index // per_block == block}
            blocks.append(_drop(weight.detach()[block * outputs : (block + 1) * outputs], 1, inside))
        self._replace(module, "weight", _like(weight, torch.cat(blocks)))
        self._decrease(module, "in_channels", len(indices))

    def _remove(self, module: nn.Module, name: str, axis: int, indices: set[int]) -> None:
        tensor = getattr(module, name, None)
        if tensor is not None:
            self._replace(module, name, _like(tensor, _drop(tensor.detach(), axis, indices)))

    def _replace(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        self._undo.append((holder, name, holder[name]))
        holder[name] = tensor

    def _decrease(self, module: nn.Module, attribute: str, by: int) -> None:
        if attribute in vars(module):
            self._set(module, attribute, vars(module)[attribute] - by)

    def _set(self, module: nn.Module, attribute: str, value: object) -> None:
        self._undo.append((vars(module), attribute, vars(module)[attribute]))
        vars(module)[attribute] = value


def _kind_of(module: nn.Module) -> LayerKind:
    kind = kind_of(module)
    assert kind is not None  # records name layers only
    return kind


def _drop(tensor: Tensor, axis: int, indices: Sequence[int] | set[int]) -> Tensor:
    dropped = set(indices)
    keep = [index for index in range(tensor.shape[axis]) if index not in dropped]
    return tensor.index_select(axis, torch.tensor(keep, dtype=torch.long, device=tensor.device))


def _like(old: Tensor, new: Tensor) -> Tensor:
    """`new` as the successor of `old`: memory format, Parameter or buffer, requires_grad, the user's attributes."""
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        vars(new).update(vars(old))
    return new
