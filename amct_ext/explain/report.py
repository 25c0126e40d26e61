"""What was done to each layer of a model, and where nothing was done, why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from amct_ext.config.plan import LayerPlan, QuantPlan
from amct_ext.config.text import FilterPrune
from amct_ext.explain.coverage import Coverage, coverage, float_reason, percent
from amct_ext.explain.reasons import layer_reasons
from amct_ext.explain.table import markdown_table
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.session import Session, session_of

_COLUMNS = ("layer", "type", "weights", "quantised", "pruned")
_NOT_A_LAYER = "not a layer: configurations cannot name it"


@dataclass(frozen=True)
class LayerReport:
    """One layer, or one weight that is no layer's.

    `quantised` and `pruned` say what was done, '' for nothing; then the field with `not_` says why. Both `pruned` and
    `not_pruned` are set where a layer only lost input channels: `not_pruned` is about its outputs. `share`: of all
    weights that the forward multiplies or looks up, 0 to 1; None where the forward uses none of it. `is_layer`: whether
    a configuration can name it.
    """

    name: str
    type: str
    quantised: str = ""
    pruned: str = ""
    not_quantised: str = ""
    not_pruned: str = ""
    share: float | None = None
    is_layer: bool = True

    @property
    def left_alone(self) -> bool:
        """Whether the layer is the float layer it was."""
        return not (self.quantised or self.pruned)


class Explanation(dict[str, LayerReport]):
    """Reports by name: layers in the model's order, then weights that belong to no layer; printed as a Markdown table.

    A weight is named by its module where it is called ``weight``, else by its own qualified name. `coverage`: how
    much of the model is quantised, printed first. `export`: what is to be known of saving this model, '' for nothing;
    printed below the table.
    """

    export: str = ""
    coverage: Coverage = Coverage()

    def __str__(self) -> str:
        rows = [
            (
                item.name,
                item.type,
                "" if item.share is None else percent(item.share),
                item.quantised or f"no: {item.not_quantised}",
                "; ".join(filter(None, (item.pruned, item.not_pruned and f"no: {item.not_pruned}"))),
            )
            for item in self.values()
        ]
        table = markdown_table(_COLUMNS, rows)
        text = f"{self.coverage}\n\n{table}"
        return f"{text}\n\nSaving: {self.export}" if self.export else text


def report(model: nn.Module) -> Explanation:
    """Report on each layer of a compressed model. Errors: ModelError (any other model)."""
    session = session_of(model)
    present = {layer.layer_name for _, layer in compressed_layers(model)}
    lost_inputs: dict[str, int] = {}
    for node in (node for record in session.channel_records for node in record.consumers):
        lost_inputs[node.name] = lost_inputs.get(node.name, 0) + len(node.prune_index)
    uses, total = session.weight_uses.weights, sum(use.weights for use in session.weight_uses.weights.values())
    shares = {name: use.weights / max(total, 1) for name, use in uses.items()}
    explanation = Explanation(
        (
            layer.name,
            replace(
                _report(layer, session, layer.name in present, lost_inputs.get(layer.name, 0)),
                share=shares.get(layer.name),
            ),
        )
        for layer in session.plan.layers.values()
    )
    for name, use in uses.items():
        if name not in explanation:
            explanation[name] = LayerReport(
                name,
                use.type,
                not_quantised=float_reason(use),
                not_pruned=_NOT_A_LAYER,
                share=shares[name],
                is_layer=False,
            )
    explanation.export, explanation.coverage = session.export_note, model_coverage(model)
    return explanation


def model_coverage(model: nn.Module) -> Coverage:
    """How much of a compressed model is quantised. Errors: ModelError (any other model)."""
    quantized = {layer.layer_name for _, layer in compressed_layers(model) if layer.weight_quantizers}
    return coverage(session_of(model), quantized)


def _report(layer: LayerPlan, session: Session, compressed: bool, lost_inputs: int) -> LayerReport:
    why = layer_reasons(session, layer.name)
    quantized, not_quantized = "", why.not_quantized
    if layer.quant is not None:
        if compressed:
            quantized = _quantized(layer.quant)
        else:
            not_quantized = not_quantized or "it was exchanged or removed after create"
    done, not_pruned = _pruned(layer, session, compressed, why.not_pruned)
    if lost_inputs:
        done.append(f"{lost_inputs} input channels removed")
    return LayerReport(layer.name, layer.type, quantized, ", ".join(done), not_quantized, not_pruned)


def _quantized(quant: QuantPlan) -> str:
    scope = "per channel" if quant.weight.channel_wise else "per tensor"
    return f"INT{quant.data.num_bits} input, INT{quant.weight.num_bits} weight {scope} ({quant.weight.algo})"


def _pruned(layer: LayerPlan, session: Session, compressed: bool, reason: str) -> tuple[list[str], str]:
    """What was done, and why nothing was."""
    if layer.prune is None or reason:
        return [], reason
    if not isinstance(layer.prune, FilterPrune):
        return (["2:4 sparse"], "") if compressed else ([], "it was exchanged or removed after create")
    node = next(
        (node for record in session.channel_records for node in record.producers if node.name == layer.name), None
    )
    if node is None:
        return [], "not in the record: the pruned model would fail or differ (the log of create says how)"
    if not node.prune_index:
        return [], f"rounding keeps all {node.end - node.begin} channels"
    return [f"{len(node.prune_index)} of {node.end - node.begin} output channels removed"], ""
