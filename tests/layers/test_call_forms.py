"""Compressed layers are called as the float layers are: by keyword, with an output size, and not otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small
from support.models.single_layer import SAMPLES, STATES
from torch import Tensor, nn

import amct_ext


class Net(nn.Module):
    """Holds a second layer of a type that every method takes."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.args, self.keywords, self.by_name = layer, args, keywords, True
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # hx before input: the order of keywords means nothing
        y = self.layer(**self.keywords, input=x) if self.by_name else self.layer(x, *self.args)
        return y[0] if isinstance(y, tuple) else y, self.other(input=x.new_ones(2, 4))


@pytest.mark.parametrize("forward", ["float", "integer"])
@pytest.mark.parametrize("config", ["quant", "sparse_quant"])
@pytest.mark.parametrize("case", SAMPLES)
def test_call_forms(tmp_path: Path, case: str, config: str, forward: Any) -> None:
    sample = SAMPLES[case]
    (tmp_path / "c.cfg").write_text(sample.settings + small.CONFIGS[config])
    x = torch.randn(sample.shape)
    net = Net(sample.build(), sample.rest, sample.keywords)
    model = amct_ext.create_compressed_retrain_model(net, x, str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"))
    amct_ext.configure(model, forward=forward)
    assert "act_quant.clip_max" in model.layer.state_dict()
    model.train()(x)[0].sum().backward()
    by_name = model.eval()(x)[0]
    model.by_name = False
    assert torch.equal(model(x)[0], by_name)
    assert by_name.shape == net(x)[0].shape
    if case in ("LSTM", "GRU"):  # the range is that of the input, not of the state, which came first
        assert model.layer.act_quant.clip_max < STATES[0].max() + 1 and x.max() > model.layer.act_quant.clip_max * 0.5
    for wrong in (lambda: model.layer(x, None, None), lambda: model.layer(inputs=x), lambda: model.layer()):
        with pytest.raises(TypeError):
            wrong()
