"""An LSTM or GRU as single layers computes what torch's class computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from amct_ext.layers.recurrent.rnn_stack import RecurrentStack

CASES = list(itertools.product([nn.LSTM, nn.GRU], [1, 3], [False, True], [False, True]))


@pytest.mark.parametrize(("cls", "layers", "bidirectional", "batch_first"), CASES)
@pytest.mark.parametrize("with_state", [False, True])
def test_outputs_and_states_are_those_of_the_float_class(
    cls: type[nn.RNNBase], layers: int, bidirectional: bool, batch_first: bool, with_state: bool
) -> None:
    rnn = cls(4, 5, layers, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(3, 7, 4)
    shape = layers * (1 + bidirectional), x.shape[0 if batch_first else 1], 5
    state = (torch.randn(shape), torch.randn(shape)) if cls is nn.LSTM else torch.randn(shape)
    given = (state,) if with_state else ()
    output, last = rnn(x, *given)
    stacked_output, stacked_last = RecurrentStack.of(rnn)(x, *given)
    torch.testing.assert_close(stacked_output, output)
    torch.testing.assert_close(stacked_last, last)


def test_parameters_hooks_and_mode_are_taken_over() -> None:
    rnn = nn.LSTM(4, 5, 2, bidirectional=True).eval()
    rnn.register_forward_hook(lambda *_: calls.append(1))
    own = dict(rnn.named_parameters())
    calls: list[int] = []
    stack = RecurrentStack.of(rnn)
    assert [name for name, _ in stack.named_children()] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert stack.l1_reverse.weight_hh_l0 is own["weight_hh_l1_reverse"]
    assert sorted(map(id, stack.parameters())) == sorted(map(id, own.values()))
    assert not any(module.training for module in stack.modules())
    stack(torch.randn(2, 3, 4))
    assert calls == [1]


def test_dropout_acts_between_the_layers_in_training_alone() -> None:
    stack = RecurrentStack.of(nn.GRU(4, 5, 2, dropout=1.0))
    x = torch.randn(2, 3, 4)
    without_input = stack.l1(torch.zeros(2, 3, 5))[0]
    torch.testing.assert_close(stack(x)[0], without_input)
    assert not torch.allclose(stack.eval()(x)[0], without_input)
