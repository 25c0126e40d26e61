"""An LSTM or GRU of several layers or both directions, as single layers of one direction each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.common.layer_kinds import kind_of
from amct_ext.layers.derive import take_attributes

States = Tensor | tuple[Tensor, ...]


class RecurrentStack(nn.Module):
    """What an nn.LSTM or nn.GRU computes, by children ``l0``, ``l0_reverse``, ``l1``, ... of that class.

    Each child is one layer of one direction, so that it can be quantised like any other. The inputs, outputs and states
    have the shapes of the float class; the input is a tensor of three dimensions. Dropout acts between the layers.
    """

    num_layers: int
    batch_first: bool
    bidirectional: bool
    dropout: float

    @staticmethod
    def of(rnn: nn.RNNBase) -> RecurrentStack:
        """Take over the parameters, hooks and settings of a float layer, which must not be used afterwards."""
        new = object.__new__(RecurrentStack)
        take_attributes(new, rnn)
        for name in [name for name in vars(new) if name.startswith(("_flat_weight", "_all_weights"))]:
            del vars(new)[name]
        vars(new)["_parameters"] = {}
        for layer in range(rnn.num_layers):
            for suffix in new.suffixes:
                setattr(new, f"l{layer}{suffix}", _part(rnn, layer, suffix))
        return new

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of a layer's directions end in."""
        return ("", "_reverse") if self.bidirectional else ("",)

    def forward(self, input: Tensor, hx: Tensor | Sequence[Tensor] | None = None) -> tuple[Tensor, States]:
        """As the float class."""
        given = None if hx is None else ((hx,) if isinstance(hx, Tensor) else tuple(hx))
        time = 1 if self.batch_first else 0
        last: list[tuple[Tensor, ...]] = []
        x = input
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self.suffixes:
                state = None if given is None else tuple(part[len(last)].unsqueeze(0) for part in given)
                y, end = getattr(self, f"l{layer}{suffix}")(
                    x.flip(time) if suffix else x, state[0] if state is not None and len(state) == 1 else state
                )
                outputs.append(y.flip(time) if suffix else y)
                last.append((end,) if isinstance(end, Tensor) else end)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        states = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
        return x, states if len(states) > 1 else states[0]

    def flatten_parameters(self) -> None:
        """As of the float class, for each child."""
        for child in self.children():
            if isinstance(child, nn.RNNBase):
                child.flatten_parameters()


def _part(rnn: nn.RNNBase, layer: int, suffix: str) -> nn.Module:
    """One layer of one direction, which holds the parameters of ``rnn`` under the names of a single layer."""
    kind = kind_of(rnn)
    assert kind is not None
    width = rnn.input_size if layer == 0 else rnn.hidden_size * (2 if rnn.bidirectional else 1)
    part: nn.Module = kind.cls(width, rnn.hidden_size, bias=rnn.bias, batch_first=rnn.batch_first, device="meta")
    for name in list(part._parameters):
        setattr(part, name, rnn._parameters[name.replace("_l0", f"_l{layer}{suffix}")])
    return part.train(rnn.training)
