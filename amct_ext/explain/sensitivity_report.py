"""What a sensitivity analysis found, and the choice of layers to leave at higher precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amct_ext.explain.table import markdown_table

_COLUMNS = (
    "layer",
    "type",
    "bits (input, weight)",
    "error",
    "of its weight",
    "share of multiplications",
    "better with",
)
_FLOAT, _INT16 = "float", "INT16 input"


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer: its bits, the error that it adds alone, the error of its weight alone, its share of multiplications.

    Errors as `sensitivity` defines them; share: 0 to 1 of the quantised layers' multiplications.
    """

    name: str
    type: str
    act_bits: int
    weight_bits: int
    error: float
    weight_error: float
    share: float

    @property
    def remedy(self) -> str:
        """What helps most: 'INT16 input' where the weight makes less than half of the error, else 'float'."""
        return _INT16 if self.act_bits == 8 and self.weight_bits == 8 and self.weight_error < self.error / 2 else _FLOAT

    @property
    def left(self) -> float:
        """The error after the remedy: none in float, that of the weight with an INT16 input."""
        return max(self.weight_error, 0.0) if self.remedy == _INT16 else 0.0


class Sensitivity:
    """The layers, most sensitive first; printed as a Markdown table.

    layers: `LayerSensitivity` each. error: of the whole model as it is. measure: 'error' (relative squared error of the
    output) or 'loss' (its rise).
    """

    def __init__(self, layers: Sequence[LayerSensitivity], error: float, measure: str) -> None:
        self.layers = tuple(sorted(layers, key=lambda layer: -layer.error))
        self.error, self.measure = error, measure

    def __str__(self) -> str:
        rows = [
            (
                layer.name, layer.type, f"{layer.act_bits}, {layer.weight_bits}", f"{layer.error:.2e}",
                f"{layer.weight_error:.2e}", f"{100 * layer.share:.1f} %", layer.remedy,
            )
            for layer in self.layers
        ]  # fmt: skip
        table = markdown_table(_COLUMNS, rows)
        what = "relative squared error of the output" if self.measure == "error" else "rise of the loss"
        return f"{table}\n\nAll layers quantised: {what} {self.error:.2e}"

    def choose(self, budget: float) -> tuple[LayerSensitivity, ...]:
        """The layers to leave at higher precision so that most error goes, within a share of the multiplications.

        ``budget``: 0 to 1. Layers are taken by error removed per multiplication, those that do not fit are passed over.
        Errors: ValueError.
        """
        if not 0 <= budget <= 1:
            raise ValueError(f"budget is a share of the multiplications, 0 to 1, not {budget}")
        chosen, remaining = [], budget
        for layer in sorted(self.layers, key=lambda layer: -(layer.error - layer.left) / max(layer.share, 1e-12)):
            if layer.error > layer.left and layer.share <= remaining:
                chosen.append(layer)
                remaining -= layer.share
        return tuple(chosen)

    def configuration(self, budget: float) -> str:
        """The lines of a configuration file that leave the layers of ``choose(budget)`` at higher precision.

        INT16 inputs are written with INT8 weights and AMCT's algorithms. Errors: ValueError.
        """
        lines = []
        for layer in self.choose(budget):
            if layer.remedy == _FLOAT:
                lines.append(f'quant_skip_layers: "{layer.name}"')
            else:
                lines.append(
                    f'override_layer_configs {{ layer_name: "{layer.name}" retrain_data_quant_config {{ ulq_quantize '
                    "{ dst_type: INT16 } } retrain_weight_quant_config { arq_retrain { } } }"
                )
        return "\n".join(lines)
