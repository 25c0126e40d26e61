"""The weights that a recorded forward multiplies or looks up, whoever holds them, and what each multiplies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from amct_ext.common.layer_kinds import LayerFamily, kind_named, kind_of
from amct_ext.graph.values import Node, Value

# By op, the arguments that it multiplies. Convolutions come with a weight, products of attention with three tensors.
_OPERANDS: Mapping[str, tuple[str, ...]] = {
    "convolution": ("input", "weight"),
    "linear": ("input", "weight"),
    "mm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "_grouped_mm": ("self", "mat2"),
}
_BATCHED = ("bmm", "baddbmm", "_grouped_mm")
_LOOK_UPS: Mapping[str, str] = {
    "embedding": "weight",
    "_embedding_bag": "weight",
    "_embedding_bag_forward_only": "weight",
    "index": "self",
    "index_select": "self",
    "gather": "self",
}


@dataclass
class WeightUse:
    """One weight that takes part in a forward.

    name: of its module, where it is called ``weight``, else of the parameter; both are qualified. type: class of the
    module. weights: elements, each parameter counted once. macs: multiplications with them in one forward. is_lookup:
    only indexed (embedding), never multiplied. reader: the op that reads it, '' where its layer does. is_batched: that
    op multiplies by a matrix for each item of a batch (experts).
    """

    name: str
    type: str
    weights: int = 0
    macs: int = 0
    is_lookup: bool = False
    reader: str = ""
    is_batched: bool = False


@dataclass
class WeightUses:
    """The weights of a forward by name, and the multiplications of activations with activations."""

    weights: dict[str, WeightUse] = field(default_factory=dict)
    activation_macs: int = 0


def weight_uses(nodes: Sequence[Node], model: nn.Module) -> WeightUses:
    """Every parameter of two and more dimensions that layers or ops of a recording multiply by, or look up in."""
    collector = _Collector(model)
    for node in nodes:
        collector.visit(node)
    return collector.result()


def product_macs(node: Node) -> int:
    """Multiplications of an op that multiplies two tensors."""
    first, second = (_argument(node, name) for name in _OPERANDS[node.op])
    if first is None or second is None:
        return 0
    output = math.prod(node.outputs[0].shape)
    if node.op == "convolution":
        of_input = node.args.get("transposed", False)  # it applies its kernel at each place of its input
        positions = math.prod(first.shape) if of_input else output
        return positions * math.prod(second.shape[1:])
    return output * first.shape[-1]


def leaf_parameters(value: Value) -> Iterator[Value]:
    """The parameters and buffers that a value which does not depend on the input is computed from."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        present = pending.pop()
        if id(present) in seen:
            continue
        seen.add(id(present))
        if present.producer is None:
            yield present
        else:
            pending += [other for other in present.producer.inputs if other is not None]


def operands(node: Node) -> tuple[Value, ...]:
    """The values that an op multiplies, empty for other ops."""
    found = (_argument(node, name) for name in _OPERANDS.get(node.op, ()))
    return tuple(value for value in found if value is not None)


def is_weight(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape is more than a vector (of one factor per channel, say)."""
    return len(shape) > 1 and sum(size > 1 for size in shape) > 1


def entry_name(parameter: str) -> str:
    """The name of a weight in reports, plans and records: its module's where it is called ``weight``, else its own."""
    owner, _, own = parameter.rpartition(".")
    return owner if own == "weight" and owner else parameter


class _Collector:
    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._uses: dict[str, WeightUse] = {}
        self._holders: dict[str, list[str]] = {}  # parameter, by the first of its names -> its entries
        first = {id(value): name for name, value in reversed(self._parameters.items())}
        self._first_name = {name: first[id(value)] for name, value in self._parameters.items()}
        self._activation_macs = 0

    def visit(self, node: Node) -> None:
        if node.module is not None:
            self._layer(node, node.module)
        elif node.op == "scripted":
            held = self._modules[node.name].named_parameters()
            self._add_use([f"{node.name}.{key}" for key, _ in held], 0, reader=f"{node.name} (TorchScript)")
        elif node.op in _LOOK_UPS:
            table = _argument(node, _LOOK_UPS[node.op])
            if table is not None and not table.depends_on_input():
                self._add_use(self._leaf_parameters(table), 0, is_lookup=True)
        elif node.op in _OPERANDS:
            self._product(node)
        elif node.op.startswith("_scaled_dot_product"):
            self._attention(node)
        elif "::" in node.op:  # an operator of the user's: what it computes is not known
            read = [value for value in node.inputs if value is not None and not value.depends_on_input()]
            self._add_use([name for value in read for name in self._leaf_parameters(value)], 0, reader=node.name)

    def result(self) -> WeightUses:
        """Each number is counted once: where it is multiplied, if it is, else where it is looked up."""
        counted: set[str] = set()
        for is_lookup in (False, True):
            for parameter, names in self._holders.items():
                found = next((name for name in names if self._uses[name].is_lookup is is_lookup), None)
                if found is not None and parameter not in counted:
                    counted.add(parameter)
                    self._uses[found].weights += self._parameters[parameter].numel()
        return WeightUses(self._uses, self._activation_macs)

    def _layer(self, node: Node, name: str) -> None:
        module, kind = self._modules[name], kind_named(node.op)
        source = node.inputs[0] if node.inputs else None
        if kind is None or kind.family is LayerFamily.BATCH_NORM:
            return
        weights = {key: value for key, value in module.named_parameters() if value.dim() > 1}
        size, positions = sum(value.numel() for value in weights.values()), 0
        if source is not None and size:
            of_input = kind.family in (LayerFamily.TRANSPOSED_CONV, LayerFamily.RNN)
            values = math.prod(source.shape if of_input else node.outputs[0].shape)
            width = kind.widths[0] if of_input else kind.widths[1]
            positions = values // max(int(getattr(module, width)), 1)
        self._count([(f"{name}.{key}", name) for key in weights], size * positions)

    def _product(self, node: Node) -> None:
        values = operands(node)
        constant = [value for value in values if not value.depends_on_input()]
        if not constant:
            self._activation_macs += product_macs(node)
            return
        macs = product_macs(node) if len(constant) < len(values) else 0  # a product of weights is computed once
        for value in constant:
            names = self._leaf_parameters(value)
            self._add_use(names, macs, reader=node.name)
            if node.op in _BATCHED and value.shape[0] > 1:
                for name in names:
                    self._uses[entry_name(name)].is_batched = True

    def _attention(self, node: Node) -> None:
        query, key = _argument(node, "query"), _argument(node, "key")
        value = _argument(node, "value")
        if query is not None and key is not None and value is not None:
            pairs = math.prod(query.shape[:-1]) * key.shape[-2]
            self._activation_macs += pairs * (query.shape[-1] + value.shape[-1])

    def _leaf_parameters(self, value: Value) -> list[str]:
        found = [source for source in leaf_parameters(value) if source.kind == "parameter"]
        weights = [source.name for source in found if is_weight(source.shape)]
        return weights or [source.name for source in found if len(source.shape) > 1]

    def _add_use(self, parameters: Iterable[str], macs: int, is_lookup: bool = False, reader: str = "") -> None:
        named = [name for name in dict.fromkeys(parameters) if self._parameters[name].dim() > 1]
        self._count([(name, entry_name(name)) for name in named], macs, is_lookup, reader)

    def _count(self, entries: Sequence[tuple[str, str]], macs: int, is_lookup: bool = False, reader: str = "") -> None:
        """Add a use of (parameter, entry) pairs; several that make up one operand share its multiplications."""
        sizes = [self._parameters[parameter].numel() for parameter, _ in entries]
        for (parameter, entry), size in zip(entries, sizes, strict=True):
            use = self._uses.get(entry)
            if use is None:
                owner = self._modules.get(entry, self._modules.get(parameter.rpartition(".")[0]))
                kind = None if owner is None else kind_of(owner)
                name = type(owner).__name__ if kind is None else kind.name
                use = self._uses[entry] = WeightUse(entry, name, is_lookup=is_lookup, reader=reader)
            use.macs += macs * size // max(sum(sizes), 1)
            use.is_lookup = use.is_lookup and is_lookup
            use.reader = use.reader or reader
            holders = self._holders.setdefault(self._first_name[parameter], [])
            if entry not in holders:
                holders.append(entry)


def _argument(node: Node, name: str) -> Value | None:
    given = node.args.get(name)
    return given if isinstance(given, Value) else None
