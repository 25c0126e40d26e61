"""Compressed LSTM and GRU: one layer, one direction; input, hidden state and both weights are quantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.common.layer_kinds import ONNX_GATES
from amct_ext.config.plan import LayerPlan, QuantPlan
from amct_ext.errors import InvalidDataError
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.weight.quantizer import WeightQuantizer

QuantizeFn = Callable[[Tensor], Tensor]
States = tuple[Tensor, ...]  # LSTM: hidden and cell; GRU: hidden
_EPS = torch.finfo(torch.float32).eps


class CompressedRNN(CompressedLayer):
    """The base of the compressed LSTM and GRU.

    The input sequence is quantised in one call and projected by one matrix product: its clips do not change within a
    sequence, so the numbers are those of a quantisation step by step. Only the recurrence is a loop. The hidden state
    has clips of its own, calibrated on the states that the recurrence reads in a float run: the initial one and all
    outputs but the last. Outputs and states have the shapes of the float class; a missing initial state is zeros.

    Children: ``act_quant`` and ``weight_quant`` (input side), ``hidden_quant`` and ``hidden_weight_quant`` (recurrent
    side). There is no ``search_n``: the accumulators of the two sides are dequantised by different scales. Source:
    AMCT's recurrent layers, which give their weights no gradient and save the biases they started with.
    """

    added_children = (*CompressedLayer.added_children, "hidden_quant", "hidden_weight_quant")
    state_count: int
    onnx_order: tuple[int, ...]  # ONNX gate -> torch gate

    hidden_quant: ActivationQuantizer | None
    hidden_weight_quant: WeightQuantizer | None
    weight_ih_l0: nn.Parameter
    weight_hh_l0: nn.Parameter
    bias_ih_l0: nn.Parameter
    bias_hh_l0: nn.Parameter
    batch_first: bool
    hidden_size: int

    def _add_children(self, plan: LayerPlan, batch_num: int, fixed_min: bool) -> None:
        if plan.quant is None:
            return
        # The ReLU that may feed the input says nothing about the hidden state, which takes both signs after one step.
        fixed_hidden = bool(plan.quant.data.fixed_min)
        self.act_quant = self._activation(plan, batch_num, fixed_min)
        self.hidden_quant = self._activation(plan, batch_num, fixed_hidden)
        self.weight_quant = self._weight(plan.quant, self.weight_ih_l0)
        self.hidden_weight_quant = self._weight(plan.quant, self.weight_hh_l0)

    def _activation(self, plan: LayerPlan, batch_num: int, fixed_min: bool) -> ActivationQuantizer:
        assert plan.quant is not None
        return ActivationQuantizer(plan.quant.data, fixed_min, batch_num, plan.name, self.weight_ih_l0.device)

    def _weight(self, plan: QuantPlan, weight: Tensor) -> WeightQuantizer:
        steps = 2 ** (plan.weight.num_bits - 1) - 1
        return WeightQuantizer(plan.weight, weight, 0, (weight.shape[1] * steps) ** -0.5)

    @property
    def own_quantizers(self) -> tuple[ActivationQuantizer, ...]:
        return tuple(q for q in (self.act_quant, self.hidden_quant) if q is not None)

    @property
    def weight_quantizers(self) -> tuple[WeightQuantizer, ...]:
        return tuple(q for q in (self.weight_quant, self.hidden_weight_quant) if q is not None)

    @torch.no_grad()
    def initialize_scales(self) -> None:
        for quantizer, weight in zip(self.weight_quantizers, self._weights_to_quantize(), strict=True):
            quantizer.initialize(weight)

    def _weights_to_quantize(self) -> tuple[Tensor, ...]:
        return (self.weight_ih_l0, self.weight_hh_l0) if self.weight_quantizers else ()

    # -- the forward

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Tensor | Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | States]:
        """As the float class: output, and the last state(s) of shape (1, batch, hidden). Errors: InvalidDataError."""
        x = input
        hidden = self._initial_state(x, hx)
        assert self.act_quant is not None and self.hidden_quant is not None
        assert self.weight_quant is not None and self.hidden_weight_quant is not None
        hidden_quant = self.hidden_quant
        states = hidden[0] if hidden_quant.calibrated else self._float_states(x, hidden)
        clips = hidden_quant.clips_for(states)
        quantized: list[tuple[Tensor, ...]] = []

        def step(state: Tensor) -> Tensor:
            return hidden_quant.quantize_step(state, clips, quantized)

        weights = self.weight_quant(self.weight_ih_l0), self.hidden_weight_quant(self.weight_hh_l0)
        output, last = self._run(self.act_quant(x), hidden, *weights, step)
        hidden_quant.end_sequence(clips, quantized)
        return output.transpose(0, 1) if self.batch_first else output, last

    def _initial_state(self, x: Tensor, hx: Tensor | Sequence[Tensor] | None) -> States:
        """The initial state(s), each (1, batch, hidden)."""
        kind = type(self).__name__.removeprefix("Compressed")
        if not isinstance(x, Tensor):
            raise InvalidDataError(
                f"layer '{self.layer_name}': a quantised {kind} takes padded tensors, not {type(x).__name__}"
            )
        if x.dim() != 3 or 0 in x.shape:
            raise InvalidDataError(
                f"layer '{self.layer_name}': the input of a quantised {kind} must have 3 dimensions and no empty one, "
                f"not {tuple(x.shape)}"
            )
        count = self.state_count
        shape = (1, x.shape[0 if self.batch_first else 1], self.hidden_size)
        if hx is None:
            return (x.new_zeros(shape),) * count
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != count or any(tuple(state.shape) != shape for state in given):
            raise InvalidDataError(
                f"layer '{self.layer_name}': the initial state of this {kind} is {count} tensor(s) of {shape}, not "
                f"{[tuple(state.shape) for state in given]}"
            )
        return given

    def _run(
        self, x: Tensor, state: States, weight_ih: Tensor, weight_hh: Tensor, quantize: QuantizeFn
    ) -> tuple[Tensor, Tensor | States]:
        """The outputs in time order, and the last state as the float class returns it."""
        x = x.transpose(0, 1) if self.batch_first else x
        projected = F.linear(x, weight_ih, getattr(self, "bias_ih_l0", None))
        bias = getattr(self, "bias_hh_l0", None)
        states = tuple(part[0] for part in state)
        outputs = []
        for inputs in projected.unbind(0):
            hidden = quantize(states[0])
            states = self._cell(inputs, F.linear(hidden, weight_hh, bias), hidden, states)
            outputs.append(states[0])
        last = tuple(part.unsqueeze(0) for part in states)
        return torch.stack(outputs), last if len(last) > 1 else last[0]

    @torch.no_grad()
    def _float_states(self, x: Tensor, state: States) -> Tensor:
        """The hidden states that an unquantised run quantises: the initial one and all outputs but the last."""
        output, _ = self._run(x.detach(), state, self.weight_ih_l0, self.weight_hh_l0, lambda hidden: hidden)
        first = state[0].to(output.dtype)
        if len(output) > 1:
            return torch.cat([first, output[:-1]])
        # A single step from a zero state: the state after it is all there is to calibrate on.
        return torch.where((first == 0).all(), output, first)

    def _cell(
        self, inputs: Tensor, recurrent: Tensor, hidden: Tensor, states: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The next state(s) from both projections, the quantised hidden state and the states before the step."""
        raise NotImplementedError

    # -- what is recorded and saved

    def gate_scales(self, recurrent: bool = False) -> Tensor:
        """Current weight scales in torch's gate order: one per output channel, or one per gate (all equal)."""
        quantizer = self.hidden_weight_quant if recurrent else self.weight_quant
        assert quantizer is not None
        scale = quantizer.current_scale(self.weight_hh_l0 if recurrent else self.weight_ih_l0)
        scale = torch.where(scale < _EPS, torch.ones_like(scale), scale)
        return scale.repeat(len(self.onnx_order)) if scale.numel() == 1 else scale

    @torch.no_grad()
    def recorded_scale_w(self) -> Tensor:
        """scale_w as recorded: gates in ONNX order."""
        return self.in_onnx_order(self.gate_scales())

    @torch.no_grad()
    def recorded_scale_r(self) -> Tensor:
        """scale_r as recorded: gates in ONNX order."""
        return self.in_onnx_order(self.gate_scales(recurrent=True))

    def in_onnx_order(self, rows: Tensor) -> Tensor:
        """Rows (any number per gate, torch's gate order) in the gate order of ONNX."""
        blocks = rows.chunk(len(self.onnx_order))
        return torch.cat([blocks[gate] for gate in self.onnx_order])


class CompressedLSTM(CompressedRNN, nn.LSTM):  # type: ignore[misc]
    onnx_order, state_count = ONNX_GATES["LSTM"], 2

    def _cell(
        self, inputs: Tensor, recurrent: Tensor, hidden: Tensor, states: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        i, f, g, o = (inputs + recurrent).chunk(4, -1)
        cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class CompressedGRU(CompressedRNN, nn.GRU):  # type: ignore[misc]
    onnx_order, state_count = ONNX_GATES["GRU"], 1

    def _cell(
        self, inputs: Tensor, recurrent: Tensor, hidden: Tensor, states: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        xr, xz, xn = inputs.chunk(3, -1)
        hr, hz, hn = recurrent.chunk(3, -1)
        candidate = (xn + (xr + hr).sigmoid() * hn).tanh()
        return (candidate + (xz + hz).sigmoid() * (hidden - candidate),)
