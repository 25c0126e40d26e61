"""Forwards that read tensors on the host: traced at save with the values of the evaluation, and told at create."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from support.models import small
from torch import Tensor, nn

import amct_ext

X = torch.randn(2, 3, 8, 8)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Conv2d(3, 32, 1)  # its channels can be pruned, whatever is read of the others
        self.a, self.bn, self.b = nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.a(self.pre(x))))


class Guard(Base):
    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        return self.b(f / 2 if f.max() > 1e4 else f)


class Item(Base):
    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        return self.b(f / max(f.max().item(), 1e-6))


class ToList(Base):
    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        return self.b(f / max(f.amax((2, 3)).mean(0)[:1].tolist()))


class Numpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        return self.b(f / float(f.numpy(force=True).max()))


class Range(Base):
    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        for _ in range(int(f.mean() * 10) + 1):
            f = f * 1.1
        return self.b(f)


class Assert(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all()
        return self.b(self.features(x))


class TopK(Base):
    def forward(self, x: Tensor) -> Tensor:
        f = self.b(self.features(x)).flatten()
        return f.topk(min(5, int((f > 0).sum()))).values


READS = {cls.__name__: cls for cls in (Guard, Item, ToList, Numpy, Range, Assert, TopK)}


def job(folder: Path, net: nn.Module, data: Any, config: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """Create, one step, evaluate, save; the model, what it evaluates to and what the file computes."""
    (folder / "c.cfg").write_text(config)
    record = str(folder / "r.txt")
    model = amct_ext.create_compressed_retrain_model(net, data, str(folder / "c.cfg"), record)
    call = data if isinstance(data, tuple) else (data,)
    model.train()(*call)
    with torch.no_grad():
        expected = model.eval()(*call)
    amct_ext.save_compressed_retrain_model(model, record, f"{folder}/m", data)
    session = onnxruntime.InferenceSession(f"{folder}/m_fake_quant_model.onnx")
    flat = [t for part in call for t in (part if isinstance(part, list) else [part])]
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), flat, strict=True)}
    wanted = expected if isinstance(expected, Tensor) else list(expected[0].values())
    out = [torch.from_numpy(value) for value in session.run(None, feeds)]
    return model, [wanted] if isinstance(wanted, Tensor) else wanted, out


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("config", [small.FILTER + small.QUANT, small.SPARSE % 0], ids=["quant", "sparse"])
def test_the_file_is_the_evaluation(name: str, config: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, wanted, out = job(tmp_path, READS[name](), X, config)
    torch.testing.assert_close(out[0], wanted[0], atol=0.02, rtol=0)
    told = [record.getMessage() for record in caplog.records if "constants in the files" in record.getMessage()]
    if name != "ToList":  # torch.export follows that one
        assert len(told) == 2 and all(f"{Path(__file__).name}:" in text for text in told)  # at create and at save
        assert "Saving: save may trace" in str(amct_ext.explain(model))


def test_the_values_are_those_of_the_quantised_model(tmp_path: Path) -> None:
    class Peak(Base):
        def forward(self, x: Tensor) -> Tensor:
            f = self.features(x)
            return self.b(f) * 0 + max(f.max().item(), 0.0)

    config = small.QUANT.replace("arq_retrain { }", "arq_retrain { dst_type: INT4 }")
    net = Peak()
    net.pre = nn.Conv2d(4, 32, 1)  # INT4 weights are packed in pairs
    _, wanted, out = job(tmp_path, net, torch.randn(2, 4, 8, 8), config)
    torch.testing.assert_close(out[0], wanted[0], atol=1e-6, rtol=0)


def test_layers_that_look_alike_and_recurrent_ones_are_found_in_a_trace(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2)])
            self.blocks[1].load_state_dict(self.blocks[0].state_dict())
            self.up, self.rnn = nn.ConvTranspose2d(3, 4, 2, 2), nn.GRU(4, 5, batch_first=True)
            self.norm, self.pool, self.fc = nn.RMSNorm(4), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                assert x.max() < 1e6
            x = self.up(x)
            return self.rnn(self.norm(x.flatten(2).mT))[0].sum(1) + self.fc(self.pool(x).flatten(1)).sum()

    _, wanted, out = job(tmp_path, Net(), X, small.QUANT)
    torch.testing.assert_close(out[0], wanted[0], atol=0.5, rtol=0.05)  # a state that is not rounded, summed up
    names = {node.name for node in onnx.load(tmp_path / "m_deploy_model.onnx").graph.node}
    assert {"blocks.0.0", "blocks.1.0", "up", "rnn", "fc"} <= names


def test_a_detector(tmp_path: Path) -> None:
    class Detector(Base):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            found = []
            for image in images:
                f = self.b(self.features(image[None]))[0].flatten(1)
                keep = torch.where(f[0] > 0)[0]
                if keep.numel() == 0:
                    keep = torch.arange(1)
                best = f[0][keep].topk(min(3, keep.numel())).indices
                found.append({"boxes": f.T[keep][best], "scores": f[0][keep][best]})
            return found

    torch.manual_seed(0)
    _, wanted, out = job(tmp_path, Detector(), ([torch.rand(3, 9, 10)],), small.QUANT)
    for seen, expected in zip(out, wanted, strict=True):
        torch.testing.assert_close(seen, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("config", [small.QUANT, small.FILTER], ids=["quant", "filter"])
def test_what_cannot_be_saved_is_told_at_create(config: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Svd(Base):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(self.b(self.features(x))).S

    (tmp_path / "c.cfg").write_text(config)
    with caplog.at_level(logging.WARNING):
        model = amct_ext.create_compressed_retrain_model(Svd(), X, str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"))
    assert f"operator aten::_linalg_svd at {__file__}:" in caplog.text
    report = amct_ext.explain(model)
    assert "cannot be exported" in report.export and report.export in str(report)


def test_what_can_be_exported_is_not_tried_at_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amct_ext.flows.create_checks.try_capture", lambda *_: pytest.fail("tried"))
    (tmp_path / "c.cfg").write_text(small.QUANT)
    assert amct_ext.explain(small.build(), small.SAMPLE, tmp_path / "c.cfg").export == ""


def test_reads_that_do_not_depend_on_the_input_are_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Sizes(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("levels", torch.tensor([4, 4]))

        def forward(self, x: Tensor) -> Tensor:
            h, w = self.levels.tolist()
            return self.b(F.interpolate(self.features(x), size=(h, w)))

    with caplog.at_level(logging.WARNING):
        _, wanted, out = job(tmp_path, Sizes(), X, small.QUANT)
    torch.testing.assert_close(out[0], wanted[0], atol=0.02, rtol=0)
    assert not caplog.text


def test_a_tensor_that_only_decides_is_no_input_of_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.fc = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y = self.gru(x)[0]
            return self.fc(torch.stack([y[i, int(length) - 1] for i, length in enumerate(lengths)]))

    (tmp_path / "c.cfg").write_text(small.QUANT)
    data, record = (torch.randn(3, 7, 5), torch.tensor([7, 5, 3])), str(tmp_path / "r.txt")
    model = amct_ext.create_compressed_retrain_model(Last(), data, str(tmp_path / "c.cfg"), record)
    model.train()(*data)
    expected = model.eval()(*data)
    with caplog.at_level(logging.WARNING):
        amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", data)
    session = onnxruntime.InferenceSession(f"{tmp_path}/m_fake_quant_model.onnx")
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"x": data[0].numpy()})[0]), expected, atol=0.02, rtol=0
    )
    assert "lengths: no inputs of the files" in caplog.text


def test_an_exporter_that_fails_prints_no_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.lstm = nn.Linear(5, 5), nn.LSTM(5, 6, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(self.a(x), lengths, batch_first=True)
            return self.lstm(packed)[1][0][-1]

    (tmp_path / "c.cfg").write_text(small.QUANT)
    data, record = (torch.randn(3, 7, 5), torch.tensor([7, 5, 3])), str(tmp_path / "r.txt")
    amct_ext.create_compressed_retrain_model(Packed(), data, str(tmp_path / "c.cfg"), record)
    said = capfd.readouterr()
    assert "graph(" not in said.out + said.err


def test_operators_that_can_be_exported_are_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Norm(Base):
        def forward(self, x: Tensor) -> Tensor:
            f = self.features(x)
            return self.b(f / torch.linalg.vector_norm(f, dim=1, keepdim=True).clamp_min(1e-3))

    (tmp_path / "c.cfg").write_text(small.QUANT)
    with caplog.at_level(logging.WARNING):
        amct_ext.create_compressed_retrain_model(Norm(), X, str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"))
    assert "constants" not in caplog.text
