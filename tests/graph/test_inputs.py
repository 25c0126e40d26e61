"""input_data in every form that a caller has it: by position, by name, in containers; and names in the files."""

from __future__ import annotations

import dataclasses
import logging
from collections import UserDict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.errors import InputDataError
from amct_ext.graph.inputs import parse_inputs

X, SCALE = torch.randn(2, 4, 6, 6), torch.full((2, 1, 1, 1), 2.0)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 8, 1)

    def run(self, x: Tensor, scale: Tensor | None) -> Tensor:
        x = torch.relu(self.a(x))
        return self.b(x if scale is None else x * scale)


class Default(Base):
    def forward(self, x: Tensor, flag: bool = True, scale: Tensor | None = None) -> Tensor:
        return self.run(x, scale)


class KeywordOnly(Base):
    def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
        return self.run(x, scale)


class Keywords(Base):
    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return self.run(x, kwargs["scale"])


class Batch(Base):
    def forward(self, batch: Any) -> Tensor:
        return self.run(batch["x"], batch["scale"])


class Extra(Base):
    def forward(self, x: Tensor, extra: Any) -> Tensor:
        return self.run(x, extra["scale"])


class OptionalExtra(Base):
    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        return self.run(x, None if extra is None else extra["scale"])


class Images(Base):
    def forward(self, images: list[Tensor], targets: Any = None) -> list[Tensor]:
        assert isinstance(images, list)
        return [self.run(image[None], None) for image in images]


@dataclasses.dataclass
class Pair:
    x: Tensor
    scale: Tensor


class OfPair(Base):
    def forward(self, pair: Pair) -> Tensor:
        return self.run(pair.x, pair.scale)


FORMS = {
    "a dict at the end": (Default, (X, {"scale": SCALE}), (X,), {"scale": SCALE}, ["x", "scale"]),
    "a dict in another order": (Default, {"scale": SCALE, "x": X}, (X,), {"scale": SCALE}, ["x", "scale"]),
    "a mapping": (Default, UserDict(scale=SCALE, x=X), (X,), {"scale": SCALE}, ["x", "scale"]),
    "keyword-only": (KeywordOnly, {"scale": SCALE, "x": X}, (), {"x": X, "scale": SCALE}, ["x", "scale"]),
    "**kwargs": (Keywords, (X, {"scale": SCALE}), (X,), {"scale": SCALE}, ["x", "scale"]),
    "a list of arguments": (Default, [X, True, SCALE], (X, True, SCALE), {}, ["x", "scale"]),
    "a list of images": (Images, [X[0]], ([X[0]],), {}, ["images_0"]),
    "the only argument is a dict": (Batch, {"x": X, "scale": SCALE}, ({"x": X, "scale": SCALE},), {}, None),
    "in a tuple": (Batch, ({"x": X, "scale": SCALE},), ({"x": X, "scale": SCALE},), {}, None),
    "of another class": (Batch, (UserDict(x=X, scale=SCALE),), ({"x": X, "scale": SCALE},), {}, None),
    "a dict that can only go by position": (Extra, (X, {"scale": SCALE}), (X, {"scale": SCALE}), {}, None),
    "a dict followed by an empty one": (OptionalExtra, (X, {"scale": SCALE}, {}), (X, {"scale": SCALE}), {}, None),
    "a dataclass": (OfPair, (Pair(X, SCALE),), (Pair(X, SCALE),), {}, ["pair_x", "pair_scale"]),
}
# name of an input -> what the test feeds
FEEDS = {"images_0": X[0], **{f"{p}x": X for p in ("", "batch_", "pair_")}}
FEEDS |= {f"{p}scale": SCALE for p in ("", "batch_", "pair_", "extra_")}


def graph_of(path: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(path).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


@pytest.mark.parametrize(
    ("form", "config"),
    [
        *((form, small.FILTER + small.QUANT) for form in FORMS),
        ("a dict at the end", small.SPARSE % 0),
        ("keyword-only", small.FILTER),
    ],
)
def test_forms_reach_trace_pruning_and_file(form: str, config: str, tmp_path: Path) -> None:
    kind, data, args, kwargs, names = FORMS[form]
    (tmp_path / "c.cfg").write_text(config)
    files = (str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"))
    model = amct_ext.create_compressed_retrain_model(kind(), data, *files)
    assert model.a.out_channels < 32 or "filter" not in config  # the pruned model was compared
    model.train()(*args, **kwargs)
    with torch.no_grad():
        expected = model.eval()(*args, **kwargs)
    amct_ext.save_compressed_retrain_model(model, files[1], f"{tmp_path}/m", data)
    path = tmp_path / "m_fake_quant_model.onnx"
    inputs = graph_of(path)[0]
    assert names is None or inputs == names
    session = onnxruntime.InferenceSession(str(path))
    out = session.run(None, {name: FEEDS[name].numpy() for name in inputs})[0]
    wanted = expected[0] if isinstance(expected, list) else expected
    torch.testing.assert_close(torch.from_numpy(out), wanted, atol=0.02, rtol=0)


def test_the_quantisation_flow_and_explain_take_names(tmp_path: Path) -> None:
    data = {"scale": SCALE, "x": X}
    paths = [str(tmp_path / name) for name in ("c.json", "r.txt", "m")]
    amct_ext.create_quant_retrain_config(paths[0], KeywordOnly(), data)
    model = amct_ext.create_quant_retrain_model(paths[0], KeywordOnly(), paths[1], data)
    model.train()(**data)
    model.eval()(**data)
    amct_ext.save_quant_retrain_model(paths[0], model, paths[1], paths[2], data)
    assert graph_of(tmp_path / "m_deploy_model.onnx")[0] == ["x", "scale"]
    assert amct_ext.explain(KeywordOnly(), data, paths[0])["a"].quantised


@pytest.mark.parametrize("data", [(X, {"scale": SCALE}), {"scale": SCALE, "x": X}], ids=["tuple", "dict"])
def test_the_search_takes_names(data: Any, tmp_path: Path) -> None:
    (tmp_path / "s.cfg").write_text("compress_ratio: 1.5\ntest_iteration: 2\nascend_optimized: false\n")
    amct_ext.auto_channel_prune_search(
        Default(), str(tmp_path / "s.cfg"), [data, torch.zeros(2, 8, 6, 6)], str(tmp_path / "out.cfg")
    )
    assert "prune_ratio" in (tmp_path / "out.cfg").read_text()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((X, {"scael": SCALE}), "names 'scael', but Default.forward takes x, flag, scale"),
        ({"x": X, "token_type_ids": X}, "names 'token_type_ids'"),
        ((X, {"x": X}), "is not a call"),
        (None, "of type NoneType"),
        (nn.Linear(1, 1), "of type Linear"),
        ([1, 2], "list without tensors"),
    ],
)
def test_what_cannot_be_meant(data: Any, words: str) -> None:
    with pytest.raises(InputDataError, match=words):
        parse_inputs(Default(), data)


@pytest.mark.parametrize(
    ("given", "inputs", "outputs"),
    [
        ({"output_names": ["out"]}, ["x", "scale"], ["out", None]),
        ({"input_names": ["image"]}, ["image", "scale"], [None, None]),
        ({"input_names": ["scale"]}, ["scale", "scale_1"], [None, None]),  # the other one steps aside
        ({"dynamic_axes": {"other": {0: "n"}}}, ["x", "scale"], [None, None]),
        ({"dynamic_axes": {"x": [0], "scale": [0], "other": [7]}, "output_names": ["o"]}, ["x", "scale"], ["o", None]),
    ],
)
def test_the_first_tensors_are_named(
    given: dict[str, Any], inputs: list[str], outputs: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Heads(Default):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return self.run(x, scale), self.a(x)

    with caplog.at_level(logging.WARNING):
        amct_ext.save_prune_retrain_model(Heads(), f"{tmp_path}/m", (X, SCALE), **given)
    found = graph_of(tmp_path / "m_deploy_model.onnx")
    assert found[0] == inputs and len(found[1]) == 2
    assert all(name in (None, seen) for name, seen in zip(outputs, found[1], strict=True))
    assert ("no input or output is named 'other'" in caplog.text) == ("dynamic_axes" in given)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"input_names": "x"}, TypeError),
        ({"output_names": [1]}, RuntimeError),
        ({"input_names": ["a", "a"]}, RuntimeError),
        ({"dynamic_axes": {"x": 0}}, RuntimeError),
    ],
)
def test_wrong_names_are_found_before_anything_is_done(
    given: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    model = Default()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error):
        amct_ext.save_prune_retrain_model(model, f"{tmp_path}/m", X, **given)
    assert not list(tmp_path.iterdir())


def test_the_callers_tensors_stay() -> None:
    class Writes(Base):
        def forward(self, x: Tensor) -> Tensor:
            x -= 1
            return self.run(x, None)

    x = torch.ones(1, 4, 2, 2)
    parse_inputs(Writes(), x).copied().call(Writes())
    assert (x == 1).all()
