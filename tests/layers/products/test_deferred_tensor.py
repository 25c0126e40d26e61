"""Results that wait for what follows a convolution: the values of the steps one by one, whoever reads them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.models.deferred_model import Net, evaluated
from torch import Tensor, nn

import amct_ext
from amct_ext.layers.products.deferred_conv import DeferredConv2d
from amct_ext.layers.products.deferred_tensor import DeferredTensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How products were computed."""
    made: list[str] = []

    def watch(name: str) -> None:
        real = getattr(DeferredConv2d, name)

        def watched(self: DeferredConv2d, *args: object) -> object:
            made.append(f"{name}+" if args and name == "compute" else name)
            return real(self, *args)

        monkeypatch.setattr(DeferredConv2d, name, watched)

    watch("compute")
    watch("compute_codes")
    return made


@pytest.mark.parametrize("norm", [True, False], ids=["with norms", "without"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_model(norm: bool, layout: torch.memory_format, tmp_path: Path, calls: list[str]) -> None:
    x = torch.randn(2, 3, 13, 18).to(memory_format=layout)
    model = evaluated(Net(norm), tmp_path, torch.randn(2, 3, 13, 18)).to(memory_format=layout)
    with torch.no_grad():
        one_by_one = model.forward(x)  # without the hooks of a whole forward
        assert not calls
        y = model(x)
    assert type(y) is Tensor and y.stride() == one_by_one.stride()
    # Stem, into the second of the inner ones, the branch, the sum, the head.
    assert calls == ["compute", "compute_codes", "compute", "compute+", "compute"]
    if norm:  # rounded once less; a code at a tie may be its neighbour
        torch.testing.assert_close(y, one_by_one, rtol=1e-4, atol=0.03 * float(y.std()))
        assert (y - one_by_one).abs().median() < 1e-6
    else:
        assert torch.equal(y, one_by_one)
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), one_by_one)  # gradients wanted


def test_only_within_an_evaluation_of_the_model(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = evaluated(Net(), tmp_path, x)
    seen: list[type] = []
    model.stem[0].register_forward_hook(lambda m, a, y: seen.append(type(y)))
    with torch.no_grad():
        model.stem(x)
        model(x)
        model.stem(x)
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    assert seen[:3] == [Tensor, DeferredTensor, Tensor]
    assert len(seen) == 5 and DeferredTensor not in seen[3:]

    def fails(*args: object) -> None:
        raise KeyError

    handle = model.head.register_forward_pre_hook(fails)
    model.eval()
    with torch.no_grad(), pytest.raises(KeyError):
        model(x)
    handle.remove()
    with torch.no_grad():
        assert type(model.stem(x)) is Tensor


def test_results_leave_the_model_as_plain_tensors(tmp_path: Path) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> dict[str, object]:
            low = self.net.stem(x)
            return {"low": low, "all": [low, (self.net.branch(low), 3)]}

    x = torch.randn(2, 3, 12, 12)
    model = evaluated(Features(), tmp_path, x)
    with torch.no_grad():
        y, expected = model(x), model.forward(x)
    torch.testing.assert_close(y["low"], expected["low"])
    assert type(y["low"]) is type(y["all"][0]) is type(y["all"][1][0]) is Tensor and y["all"][1][1] == 3


def test_two_readers(tmp_path: Path, calls: list[str]) -> None:
    """Right the first time, at the price of computing twice; never again."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20)
            self.one, self.other = nn.Conv2d(20, 4, 1), nn.Conv2d(20, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.one(self.norm(y)) + self.other(y)

    x = torch.randn(2, 3, 12, 12)
    model = evaluated(Twice(), tmp_path, x)
    with torch.no_grad():
        expected = model.forward(x)
        first = model(x)
        assert calls.count("compute_codes") == 2
        calls.clear()
        assert torch.equal(model(x), expected) and calls.count("compute_codes") == 0
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=0.03 * float(expected.std()))


def test_nan_is_noticed(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = evaluated(Net(), tmp_path, x)
    with torch.no_grad():
        model.inner[1].weight[0] = torch.nan
        # A NaN has the lowest code; the evaluation records factors anew, for a weight changed, and says what it met.
        with pytest.raises(amct_ext.AmctError, match=r"inner\.3.*NaN or Inf"):
            model(x)
