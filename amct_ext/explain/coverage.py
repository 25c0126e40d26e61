"""How much of a model is quantised: shares of all weights and of all multiplications, and what stays float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from amct_ext.graph.weight_use import WeightUse
from amct_ext.model_surgery.session import Session

_FLOAT = "float"
_MAX_LISTED = 5  # float weights named in the line
IS_LOOKUP = "its rows are looked up, nothing multiplies it"


@dataclass(frozen=True)
class Coverage:
    """Shares (0 to 1) by format, 'INT8', 'INT4' or 'float'; printed as one line.

    weights: of all numbers in parameters of two and more dimensions that the forward multiplies or looks up. macs: of
    the multiplications of one forward on create's input, those of activations with activations (attention) among them.
    float_weights: share of each weight that stays float, largest first.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    macs: Mapping[str, float] = field(default_factory=dict)
    float_weights: Mapping[str, float] = field(default_factory=dict)
    activation_macs: float = 0.0

    @property
    def quantised(self) -> float:
        """Share of the weights that is quantised."""
        return 1.0 - self.weights.get(_FLOAT, 0.0) if self.weights else 0.0

    def __str__(self) -> str:
        formats = [name for name in self.weights if name != _FLOAT] or ["INT8"]
        parts = [
            f"{name}: {percent(self.weights.get(name, 0.0))} of weights, {percent(self.macs.get(name, 0.0))} of MACs"
            for name in formats
        ]
        names = list(self.float_weights)
        floats = [f"{name} {percent(self.float_weights[name])}" for name in names[:_MAX_LISTED]]
        if len(names) > _MAX_LISTED:
            rest = sum(self.float_weights[name] for name in names[_MAX_LISTED:])
            floats.append(f"{len(names) - _MAX_LISTED} more {percent(rest)}")
        if floats:
            parts.append(f"float: {percent(self.weights[_FLOAT])} of weights: {', '.join(floats)}")
        if self.activation_macs >= 0.0005:
            parts.append(f"products of activations (float): {percent(self.activation_macs)} of MACs")
        return "; ".join(parts)


def coverage(session: Session, compressed: set[str]) -> Coverage:
    """The coverage of a model; `compressed`: the layers that are quantised, by their names at create."""
    uses = session.weight_uses
    total = sum(use.weights for use in uses.weights.values())
    macs = uses.activation_macs + sum(use.macs for use in uses.weights.values())
    of_weights: dict[str, int] = {}
    of_macs: dict[str, int] = {_FLOAT: uses.activation_macs}
    for use in uses.weights.values():
        name = _format(session, use, compressed)
        of_weights[name] = of_weights.get(name, 0) + use.weights
        of_macs[name] = of_macs.get(name, 0) + use.macs
    floats = {use.name: use.weights for use in uses.weights.values() if _format(session, use, compressed) == _FLOAT}
    order = sorted((name for name in floats if floats[name]), key=lambda name: -floats[name])
    return Coverage(
        {name: count / max(total, 1) for name, count in sorted(of_weights.items(), reverse=True)},
        {name: count / max(macs, 1) for name, count in sorted(of_macs.items(), reverse=True)},
        {name: floats[name] / max(total, 1) for name in order},
        uses.activation_macs / max(macs, 1),
    )


def float_reason(use: WeightUse) -> str:
    """Why a weight that belongs to no layer of the plan stays float."""
    if use.is_lookup:
        return IS_LOOKUP
    if use.is_batched:
        return f"{use.reader} multiplies by it, a matrix for each item of a batch; quantised products take one for all"
    return f"{use.reader} multiplies by it, not a layer of its own" if use.reader else f"{use.type} stays float"


def percent(share: float) -> str:
    """A share in per cent with one decimal; never rounds a non-zero share to 0 or an incomplete one to 100."""
    value = 100 * share
    if 0 < value < 0.05:
        return "<0.1 %"
    return f"{min(value, 99.9) if share < 1 else value:.1f} %"


def _format(session: Session, use: WeightUse, compressed: set[str]) -> str:
    layer = session.plan.layers.get(use.name)
    if layer is None or layer.quant is None or use.name not in compressed:
        return _FLOAT
    return f"INT{layer.quant.weight.num_bits}"
