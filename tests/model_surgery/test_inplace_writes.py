"""Forwards that write into tensors that something else reads, the caller's among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.jobs.any_job import AnyJob
from support.models import small
from support.models.net_of_function import Net
from support.models.small import linear
from torch import Tensor, nn

import amct_ext
from amct_ext.graph.inputs import Inputs

IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "nn.Dropout": nn.Dropout(0.5, inplace=True),
    "dropout": lambda x: F.dropout(x, 0.5, True, inplace=True),
    "relu_": lambda x: x.relu_(),
    "add_": lambda x: x.add_(1.0),
    "a view": lambda x: x[:, :4].zero_(),
    "numpy": lambda x: x.detach().numpy().fill(0.5),
}


@pytest.mark.parametrize("change", list(IN_PLACE))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", ["float", "integer"])
def test_an_input_changed_between_its_readers(
    tmp_path: Path, change: str, mode: Any, training: bool, forward: Any
) -> None:
    """The second reader takes the values that are there when it runs."""

    def run_both(net: Any, x: Tensor) -> Tensor:
        x = x.clone()
        y = net.a(x)
        IN_PLACE[change](x)
        return y + net.b(x)

    x = torch.randn(16, 8)
    drop = IN_PLACE[change]
    if isinstance(drop, nn.Module):
        drop.train(training)
    model = AnyJob(tmp_path, small.QUANT).calibrated(Net(run_both, a=linear(), b=linear()), x).train(training)
    amct_ext.configure(model, forward=forward)
    with mode():
        torch.manual_seed(1)
        seen = model(x)
        torch.manual_seed(1)
        changed = x.clone()
        IN_PLACE[change](changed)
        expected = model.a(x) + model.b(changed)
    torch.testing.assert_close(seen, expected)


def test_a_compiled_model_sees_the_change(tmp_path: Path) -> None:
    def run_both(net: Any, x: Tensor) -> Tensor:
        x = x * 1.0
        y = net.a(x)
        net.drop(x)
        return y + net.b(x)

    x = torch.randn(16, 8)
    net = Net(run_both, a=linear(), b=linear(), drop=nn.Dropout(1.0, inplace=True))
    model = AnyJob(tmp_path, small.QUANT).calibrated(net, x).train()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


class Writes(nn.Module):
    """Preprocessing in place, of a tensor and of one inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Sequential(linear(), linear()), nn.Conv2d(1, 4, 1)

    def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
        x -= 1.0
        more[0].mul_(2.0)
        more.append(x)
        return self.fc(x) + self.conv(more[0][:, None])[:, 0]


@pytest.mark.parametrize("config", [small.QUANT, small.SPARSE % 0, small.FILTER], ids=["quant", "sparse", "filter"])
def test_the_callers_tensors_stay_as_they_are(tmp_path: Path, config: str) -> None:
    data = torch.ones(1, 8, 8), [torch.ones(1, 8, 8)]

    def whole() -> bool:
        return bool((data[0] == 1).all() and (data[1][0] == 1).all()) and len(data[1]) == 1

    job, net = AnyJob(tmp_path, config), Writes()
    model = job.create(net, data)
    assert whole()
    model.train()(*Inputs(data).copied().args)
    model.eval()(*Inputs(data).copied().args)
    torch.save({"model": model.state_dict()}, tmp_path / "state.pth")
    restored = (net, data, job.config, job.record, str(tmp_path / "state.pth"), "model")
    amct_ext.restore_compressed_retrain_model(*restored)
    assert whole()
    amct_ext.explain(net, data, job.config)
    assert whole()
    job.save(model, data)
    assert whole()


def test_arguments_are_copied_as_they_are() -> None:
    leaf = torch.ones(2, requires_grad=True)
    module, text = linear(), "text"
    x, inside, same, again, kept = Inputs((leaf * 2, {"a": [leaf]}, text, leaf, module)).copied().args
    assert x.requires_grad
    assert x.is_leaf
    assert inside["a"][0] is again
    assert again is not leaf
    assert (same, kept) == (text, module)
    (other, lock) = Inputs((leaf, (item for item in ()))).copied().args  # what cannot be copied stays
    assert other is not leaf
    assert list(lock) == []
