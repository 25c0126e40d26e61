"""MultiheadAttention split into its projections: torch's numbers and state, and whole jobs that quantise them."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path

import onnx
import pytest
import torch
from support.checks.onnx_run import run_onnx
from support.models import small
from support.models.custom_forwards import train
from torch import Tensor, nn

import amct_ext
from amct_ext.layers.attention import SplitAttention


class Named(nn.MultiheadAttention):
    """A subclass of the user's that keeps torch's forward."""


class Block(nn.Module):
    """Self-attention in front of a Linear."""

    def __init__(self, cls: type[nn.MultiheadAttention] = nn.MultiheadAttention, need_weights: bool = False) -> None:
        super().__init__()
        self.attention, self.fc = cls(8, 2, batch_first=True), nn.Linear(8, 8)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        x = x + y
        return x + self.fc(x) if weights is None else x + self.fc(x) + weights.sum() * 0.01


class Mixed(nn.Module):
    """Query, key and value of three widths: a weight for each."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(8, 6), nn.Linear(8, 10)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, add_bias_kv=True)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.keys(x), self.values(x))[0]


class Cross(nn.Module):
    """One packed weight for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.enter(x)
        return self.attention(x, memory, memory)[0]


OPTIONS = ("bias", "add_bias_kv", "add_zero_attn", "batch_first", "widths", "batched")


@pytest.mark.parametrize("options", itertools.product([False, True], repeat=6), ids=str)
def test_the_numbers_of_torch(options: tuple[bool, ...]) -> None:
    """Every combination of the module's settings, each with every combination of masks and of results."""
    torch.manual_seed(0)
    arguments = dict(zip(OPTIONS, options, strict=True))
    widths, batched = arguments.pop("widths"), arguments.pop("batched")
    plain = nn.MultiheadAttention(8, 2, **arguments, **({"kdim": 6, "vdim": 10} if widths else {}))
    if plain.in_proj_bias is not None:
        nn.init.normal_(plain.in_proj_bias)
    split = SplitAttention.of(copy.deepcopy(plain))
    query = torch.randn(3, 5, 8)
    inputs = (query, torch.randn(3, 4, 6), torch.randn(3, 4, 10)) if widths else (query,) * 3
    keys = 4 if widths else 5
    if not batched:
        inputs = tuple(dict.fromkeys(inputs))  # one tensor stays one
        inputs = tuple(x[0] for x in inputs) if widths else (inputs[0][0],) * 3
    elif not arguments["batch_first"]:
        inputs = tuple(x.transpose(0, 1) for x in inputs) if widths else (query.transpose(0, 1),) * 3
    masks = (None, torch.rand(5, keys) > 0.8, torch.randn(6 if batched else 2, 5, keys))
    padding = torch.zeros(3, keys, dtype=torch.bool)
    padding[:, 0] = True
    for mask, pad, need, average in itertools.product(masks, (None, padding), (False, True), (False, True)):
        given = {
            "attn_mask": mask,
            "key_padding_mask": pad if pad is None or batched else pad[0],
            "need_weights": need,
            "average_attn_weights": average,
        }
        torch.testing.assert_close(split(*inputs, **given), plain(*inputs, **given), equal_nan=True)


def test_calls_on_other_tensors_than_the_traced_ones() -> None:
    plain = nn.MultiheadAttention(8, 2)
    split, x, y, z = SplitAttention.of(copy.deepcopy(plain)), *(torch.randn(4, 3, 8) for _ in range(3))
    for inputs in ((x, y, y), (x, x, y), (x, y, z)):
        torch.testing.assert_close(split(*inputs), plain(*inputs))


def test_names_and_state_stay() -> None:
    for arguments in ({}, {"kdim": 6, "vdim": 10}):
        plain = nn.MultiheadAttention(8, 2, **arguments)
        split = SplitAttention.of(copy.deepcopy(plain))
        assert list(split.state_dict()) == list(plain.state_dict())
        assert [name for name, _ in split.named_parameters()] == [name for name, _ in plain.named_parameters()]
        other = {key: torch.randn_like(value) for key, value in plain.state_dict().items()}
        for assign in (False, True):
            assert split.load_state_dict(other, assign=assign) == plain.load_state_dict(other)
            first = next(iter(split._projections().items()))
            assert split.get_submodule(first[0]).weight is split.get_parameter(first[1])
        missing = split.load_state_dict({}, strict=False).missing_keys
        assert missing == plain.load_state_dict({}, strict=False).missing_keys
        split.double().to("meta")
        assert split.get_submodule(first[0]).weight is split.get_parameter(first[1])


@pytest.mark.parametrize("cls", [nn.MultiheadAttention, Named])
def test_copies_and_pickles(cls: type[nn.MultiheadAttention]) -> None:
    x = torch.randn(3, 5, 8)
    split = SplitAttention.of(cls(8, 2, batch_first=True))
    assert isinstance(split, cls)
    file = io.BytesIO()
    torch.save(split, file)
    file.seek(0)
    for other in (copy.deepcopy(split), torch.load(file, weights_only=False)):
        assert other.in_proj.weight is other.in_proj_weight is not split.in_proj_weight
        assert torch.equal(other(x, x, x)[0], split(x, x, x)[0]) and isinstance(other, cls)


MODELS = {
    "self": Block,
    "subclass": lambda: Block(Named),
    "weights": lambda: Block(need_weights=True),
    "separate": Mixed,
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_job(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    net, x, files = MODELS[kind](), torch.randn(3, 5, 8), (str(tmp_path / "job.cfg"), str(tmp_path / "record.txt"))
    (tmp_path / "job.cfg").write_text(small.QUANT)
    keys = set(net.state_dict())
    model = amct_ext.create_compressed_retrain_model(net, x, *files)
    report = amct_ext.explain(model)
    assert report.coverage.weights == {"INT8": 1.0} and all(item.quantised for item in report.values())
    assert keys <= set(model.state_dict())
    assert not any(".in_proj.weight" in key for key in set(model.state_dict()) - keys if "weight_quant" not in key)

    train(model, x)
    with torch.no_grad():
        expected = model.eval()(x)
    amct_ext.save_compressed_retrain_model(model, files[1], str(tmp_path / "net"), x)
    off = (run_onnx(tmp_path / "net_fake_quant_model.onnx", x) - expected).abs() / expected.abs().max()
    assert off.median() < 1e-3 and off.max() < 0.05
    entries = onnx.load(tmp_path / "net_deploy_model.onnx").graph.initializer
    integers = {entry.name for entry in entries if entry.data_type == onnx.TensorProto.INT8}
    assert integers == {f"{name}.weight" for name in report}
    torch.save(model.state_dict(), tmp_path / "state.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, x, *files, str(tmp_path / "state.pth"))
    for each in (copy.deepcopy(model), restored):
        with torch.no_grad():
            assert torch.equal(each.eval()(x), expected)
    train(model, x)
    train(restored, x)
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), model.eval()(x))


def test_two_inputs_and_one_weight_stay_float(tmp_path: Path) -> None:
    (tmp_path / "job.cfg").write_text(small.QUANT)
    report = amct_ext.explain(Cross(), torch.randn(5, 3, 8), tmp_path / "job.cfg")
    assert report["enter"].quantised and not report["attention.in_proj_weight"].quantised
    assert report["attention.in_proj_weight"].share == 192 / 320


def test_the_configuration_leaves_them_out(tmp_path: Path) -> None:
    text = small.QUANT + 'skip_layers: "attention.in_proj"\nskip_layers: "attention.out_proj"\n'
    (tmp_path / "job.cfg").write_text(text)
    report = amct_ext.explain(Block(), torch.randn(3, 5, 8), tmp_path / "job.cfg")
    assert report["attention.in_proj"].not_quantised == report["attention.out_proj"].not_quantised
    assert report["fc"].quantised and report["attention.in_proj"].not_quantised == "named in skip_layers"


def test_a_job_begun_with_a_float_attention_stays_as_it_is(tmp_path: Path) -> None:
    net, x, files = Block(), torch.randn(3, 5, 8), (str(tmp_path / "job.cfg"), str(tmp_path / "record.txt"))
    (tmp_path / "job.cfg").write_text(small.QUANT)
    model = amct_ext.create_compressed_retrain_model(net, x, *files)
    old = {key: value for key, value in model.state_dict().items() if key in net.state_dict() or key.startswith("fc.")}
    torch.save(old, tmp_path / "old.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, x, *files, str(tmp_path / "old.pth"))
    assert "as a float layer" in amct_ext.explain(restored)["attention.in_proj"].not_quantised


def test_pruning_keeps_the_heads(tmp_path: Path) -> None:
    (tmp_path / "job.cfg").write_text(small.FILTER + small.QUANT)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), Block(), nn.Linear(8, 2))
    x = torch.randn(3, 5, 8)
    model = amct_ext.create_compressed_retrain_model(net, x, str(tmp_path / "job.cfg"), str(tmp_path / "record.txt"))
    assert model[0].out_features < 16 and model[3].attention.in_proj_weight.shape == (24, 8)
    assert model[3].attention.in_proj.weight is model[3].attention.in_proj_weight
    model.eval()(x)
