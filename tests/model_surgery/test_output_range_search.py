"""range_search: OUTPUT: what is chosen, that nothing else changes, and what happens where a model cannot run again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import amct_ext
from amct_ext.layers.activation.range_search import ClipPair
from amct_ext.model_surgery import output_range_search
from amct_ext.model_surgery.session import activation_quantizers, session_of

CONFIG = (
    "batch_num: {}\nretrain_data_quant_config {{ ulq_quantize {{ {} }} }} "
    "retrain_weight_quant_config {{ arq_retrain {{ }} }}"
)


class Net(nn.Module):
    """Two branches: outliers of the input that `head` reads do not matter, those that `wide` reads do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.drop, self.lstm, self.head = nn.Dropout(0.5), nn.LSTM(8, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        self.calls += 1
        x = self.drop(torch.relu(self.norm(self.first(x * scale))))
        self.last, _ = self.lstm(x.permute(2, 0, 1))
        return {"scores": self.head(self.last)}


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(16, 4, 32, generator=torch.Generator().manual_seed(seed))


def created(
    folder: Path, data: str = "range_search: OUTPUT", batch_num: int = 1, net: nn.Module | None = None
) -> nn.Module:
    torch.manual_seed(0)
    (folder / "c.cfg").write_text(CONFIG.format(batch_num, data))
    net = Net() if net is None else net
    return amct_ext.create_compressed_retrain_model(net, inputs(), str(folder / "c.cfg"), str(folder / "r.txt"))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "_quant.clip" not in k and "prev_clip" not in k}


@pytest.mark.parametrize("batch_num", [1, 2])
def test_nothing_but_the_clips_changes(tmp_path: Path, batch_num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """State, output, random numbers and gradients are those of the same forwards without the search."""
    ran, real = [], output_range_search._Evaluator.output
    monkeypatch.setattr(output_range_search._Evaluator, "output", lambda *args: ran.append(0) or real(*args))
    found = []
    for searched in (True, False):
        if not searched:
            monkeypatch.setattr(output_range_search, "_search", lambda _, candidates: [each[0] for each in candidates])
        model = created(tmp_path, batch_num=batch_num).train()
        torch.manual_seed(1)
        for i in range(batch_num):
            assert not ran
            out = model(inputs(i), scale=2.0)["scores"]
        count, last = len(ran), model.last
        assert torch.equal(last, out) or last.shape[:2] == out.shape[:2]
        out.square().mean().backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if "clip" not in k and p.grad is not None}
        found.append((snapshot(model), out.detach(), torch.rand(3), gradients, last.detach()))
        assert (count > 4) == searched and count <= 100
        ran.clear()
        model(inputs(9))
        assert not ran
    (state, out, noise, gradients, last), (right, *others, plain, kept) = found
    assert torch.equal(out, others[0]) and torch.equal(noise, others[1]) and torch.equal(last, kept)
    for key, value in right.items():
        assert torch.equal(state[key].nan_to_num(7), value.nan_to_num(7)), key
    for key, value in plain.items():
        assert torch.equal(gradients[key], value), key


def test_the_output_decides(tmp_path: Path) -> None:
    """A large value that the next layer needs keeps its range; one that it ignores does not."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.uses, self.ignores = nn.Linear(64, 1, bias=False), nn.Linear(64, 1, bias=False)
            with torch.no_grad():
                self.uses.weight.fill_(0.01)[0, 0] = 1.0
                self.ignores.weight.fill_(0.01)[0, 0] = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return self.uses(x) + 100 * self.ignores(x + 1 - 1)

    x = torch.randn(200, 64)
    x[:, 0] *= 40 * (torch.rand(200) < 0.05)
    torch.manual_seed(0)
    (tmp_path / "c.cfg").write_text(CONFIG.format(1, "range_search: OUTPUT"))
    model = amct_ext.create_compressed_retrain_model(Two(), x, str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"))
    model.train()(x)
    assert model.uses.act_quant.clip_max > 2 * model.ignores.act_quant.clip_max


class Copies(nn.Module):
    """Returns what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def squared_error(model: nn.Module, batches: list[Tensor]) -> float:
    """Of the output relative to float's, summed over the batches."""
    with torch.no_grad():
        return sum(float((model(x) - x).square().sum() / x.square().sum()) for x in batches)


def heavy_tails(number: int) -> Tensor:
    """A value in fifty is six times as large."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(64, 8, generator=generator)
    return x * torch.where(torch.rand(64, 8, generator=generator) < 0.02, 6, 1)


def calibrated(folder: Path, batches: list[Tensor]) -> nn.Module:
    (folder / "c.cfg").write_text(CONFIG.format(len(batches), "range_search: OUTPUT"))
    model = amct_ext.create_compressed_retrain_model(Copies(), batches[0], str(folder / "c.cfg"), str(folder / "r.txt"))
    amct_ext.calibrate(model, batches)
    return model.eval()


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_ranges_are_widened_and_narrowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Where all candidates are too narrow or too wide, the range found is nearly as good as that of good candidates."""
    batches, real = [heavy_tails(i) for i in range(8)], output_range_search._search
    monkeypatch.setattr(output_range_search, "_MAX_RUNS", 400)
    good = squared_error(calibrated(tmp_path, batches), batches)

    def scaled(evaluator: object, candidates: list[list[ClipPair]]) -> list[ClipPair]:
        return real(evaluator, [[ClipPair(*(factor * end for end in clips)) for clips in each] for each in candidates])

    monkeypatch.setattr(output_range_search, "_search", scaled)
    found = calibrated(tmp_path, batches)
    assert squared_error(found, batches) < 1.02 * good
    monkeypatch.setattr(output_range_search, "_FACTORS", ())
    assert squared_error(calibrated(tmp_path, batches), batches) > 1.3 * good


@pytest.mark.parametrize("limit", [6, 20])
def test_the_runs_of_a_search_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """One that is stopped early keeps what it has found."""
    monkeypatch.setattr(output_range_search, "_MAX_RUNS", limit)
    ran, real = [], output_range_search._Evaluator.output
    monkeypatch.setattr(output_range_search._Evaluator, "output", lambda *args: ran.append(0) or real(*args))
    batches = [heavy_tails(i) for i in range(3)]
    model = calibrated(tmp_path, batches)
    assert len(ran) == limit
    assert squared_error(model, batches) < 1


def test_the_last_eight_inputs_are_kept_until_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    real = output_range_search._Evaluator.__init__

    def noted(self: object, model: nn.Module, inputs: list, quantizers: list) -> None:
        kept.extend(each.args[0] for each in inputs)
        real(self, model, inputs, quantizers)

    monkeypatch.setattr(output_range_search._Evaluator, "__init__", noted)
    batches = [heavy_tails(i) for i in range(10)]
    model = calibrated(tmp_path, batches)
    assert len(kept) == 8 and all(torch.equal(one, two) for one, two in zip(kept, batches[2:], strict=True))
    assert not session_of(model).calibration_inputs and not session_of(copy.deepcopy(model)).calibration_inputs


@pytest.mark.parametrize("mode", ["train", "calibrate", "restored"])
def test_ranges_are_chosen_once(tmp_path: Path, mode: str) -> None:
    model = created(tmp_path)
    if mode == "calibrate":
        amct_ext.calibrate(model, [inputs()])
    else:
        model.train()(inputs())
    clips = [float(q.clip_max.detach()) for q in activation_quantizers(model)]
    if mode == "restored":
        model.eval()(inputs())
        torch.save(model.state_dict(), tmp_path / "s.pth")
        files = str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"), str(tmp_path / "s.pth")
        restored = amct_ext.restore_compressed_retrain_model(Net(), inputs(), *files)
        for key, value in model.state_dict().items():
            assert torch.equal(value.nan_to_num(7), restored.state_dict()[key].nan_to_num(7)), key
        model = restored
    with torch.no_grad():
        model.train()(50 * inputs(3))
    assert clips == [float(q.clip_max.detach()) for q in activation_quantizers(model)]
    assert not any(q.bypassed or q.candidates for q in activation_quantizers(model))
    assert all(q.range_decided for q in activation_quantizers(copy.deepcopy(model)))


class Once(Net):
    """Cannot run twice without being told to."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        if self.armed and self.last is not None:
            raise ValueError("call reset first")
        return super().forward(x, scale=scale)

    armed = False


class Codes(Net):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        return {"codes": super().forward(x, scale=scale)["scores"].argmax(-1)}


class Varies(Net):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        scores = super().forward(x, scale=scale)["scores"]
        return {"scores": scores[scores > scores.mean()]}


@pytest.mark.parametrize(("cls", "why"), [(Once, "call reset first"), (Codes, "no floating-point"), (Varies, "shapes")])
def test_a_model_that_cannot_run_again(
    cls: Callable[[], nn.Module], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for search in ("OUTPUT", "ABSOLUTE_ERROR"):
        torch.manual_seed(0)
        model = created(tmp_path, f"range_search: {search}", net=cls())
        model.last, model.armed = None, True
        torch.manual_seed(1)
        caplog.clear()
        model.train()(inputs())
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == (search == "OUTPUT")
        if warned:
            assert "range_search: OUTPUT" in warned[0] and why in warned[0] and "'first' and 3 more" in warned[0]
        found.append({k: v for k, v in model.state_dict().items() if "clip_m" in k})
        assert not any(q.bypassed for q in activation_quantizers(model))
    for key, value in found[1].items():
        assert torch.equal(found[0][key], value), key


def test_a_forward_that_writes_into_its_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Writes(Net):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
            return super().forward(x.mul_(3).sub_(1), scale=scale)

    found = []
    for cls in (Net, Writes):
        torch.manual_seed(0)
        net = cls()
        model = created(tmp_path, net=net)
        torch.manual_seed(1)
        model.train()(inputs().mul_(3).sub_(1) if cls is Net else inputs())
        found.append([float(q.clip_max.detach()) for q in activation_quantizers(model)])
    assert found[0] == found[1] and not caplog.records


def test_a_compiled_graph_keeps_the_absolute_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for search in ("OUTPUT", "ABSOLUTE_ERROR"):
        model = created(tmp_path, f"range_search: {search}", net=nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU()))
        caplog.clear()
        torch.compile(model, backend="eager")(inputs())
        state = model.train().state_dict()
        torch.compile(model, backend="eager", fullgraph=False)(inputs())
        state = model.state_dict()
        found.append(state["0.act_quant.clip_max"])
        assert caplog.text.count("range_search: OUTPUT takes a calibration") <= 1
    assert torch.equal(*found) or "OUTPUT takes" not in caplog.text
