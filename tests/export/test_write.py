"""ONNX export of small models of our own: what the two files hold, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from support.models.export_models import (
    PAIRS,
    SHAPES,
    Mixed,
    Tokens,
    Upsampling,
    build,
    nodes,
    operators,
    record_all,
    run,
    simulate,
    tensors,
)
from torch import nn

from amct_ext.export.deploy import pack_int4
from amct_ext.export.factors import layer_factors
from amct_ext.export.write import export_quantized
from amct_ext.record.types import QuantRecord

Exported = Callable[[type[nn.Module]], tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Both files of a model, exported once for all tests."""
    done: dict[type[nn.Module], tuple[Path, Path]] = {}

    def export(kind: type[nn.Module]) -> tuple[Path, Path]:
        if kind not in done:
            model, x = build(kind)
            folder = tmp_path_factory.mktemp(kind.__name__)
            pairs = PAIRS[kind]
            done[kind] = export_quantized(model, x, record_all(model, pairs), pairs, f"{folder}/m")
        return done[kind]

    return export


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
def test_fake_quant_model_computes_what_the_formulas_say(kind: type[nn.Module], exported: Exported) -> None:
    model, x = build(kind)
    onnx.checker.check_model(onnx.load(exported(kind)[0]))
    expected = simulate(model, x, record_all(model, PAIRS[kind]), PAIRS[kind])
    np.testing.assert_allclose(run(exported(kind)[0], x), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
def test_deploy_model_holds_the_integers_of_the_fake_quant_model(kind: type[nn.Module], exported: Exported) -> None:
    fake_quant, deploy = (tensors(path) for path in exported(kind))
    scales = {name: node for name, node in nodes(exported(kind)[0]).items() if name.endswith(".dqscale")}
    for record in record_all(build(kind)[0], PAIRS[kind]):
        assert deploy[f"{record.key}.weight"].dtype == np.int8
        np.testing.assert_array_equal(deploy[f"{record.key}.weight"], fake_quant[f"{record.key}.weight"])
        words = deploy[f"{record.key}.dequant.param"]
        assert words.dtype == np.uint64
        value = numpy_helper.to_array(scales[f"{record.key}.fakedequant.dqscale"].attribute[0].t)
        np.testing.assert_array_equal(words.astype(np.uint32).view(np.float32), value.ravel())
        node = nodes(exported(kind)[1])[record.key]
        if node.op_type != "MatMul" and len(node.input) > 2:
            assert deploy[f"{record.key}.bias"].dtype == np.int32
            np.testing.assert_array_equal(deploy[f"{record.key}.bias"], fake_quant[f"{record.key}.bias"])


def test_layers_that_share_an_input_share_its_quantisation(exported: Exported, tmp_path: Path) -> None:
    model, x = build(Mixed)
    assert operators(exported(Mixed)[1])["AscendQuant"] == 3
    assert operators(exported(Mixed)[0])["Round"] == 3
    assert nodes(exported(Mixed)[1])["b"].input[0] == "a.quant.output0"
    records = [r for r in record_all(model, PAIRS[Mixed]) if r.key != "b"]
    records += [r for r in record_all(model, PAIRS[Mixed], scale_d=0.02) if r.key == "b"]
    apart = export_quantized(model, x, records, PAIRS[Mixed], f"{tmp_path}/m")
    assert operators(apart[1])["AscendQuant"] == 4


def test_nodes_are_named_after_their_layers(exported: Exported) -> None:
    fake_quant, deploy = (nodes(path) for path in exported(Mixed))
    chain = [f"stem.quant.fakequant.{step}" for step in ("mul", "round", "add", "clip", "sub")]
    assert set(chain) | {"stem", "stem.fakedequant.mul", "stem.fakedequant.dqscale"} <= set(fake_quant)
    assert {"stem", "stem.quant", "stem.dequant", "fc", "/Relu", "/Flatten"} <= set(deploy)
    quant = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in deploy["stem.quant"].attribute}
    assert quant == {"scale": np.float32(1) / np.float32(0.031), "offset": -3.0, "dst_type": b"INT8"}
    assert [a.i for a in deploy["stem.dequant"].attribute] == [0]


def test_linear_on_tokens_adds_its_float_bias_behind_the_dequantisation(exported: Exported) -> None:
    deploy = exported(Tokens)[1]
    assert nodes(deploy)["up"].op_type == "MatMul"
    add = next(node for node in onnx.load(deploy).graph.node if "up.bias" in node.input)
    assert add.op_type == "Add"
    assert "up.dequant.output0" in add.input
    assert tensors(deploy)["up.bias"].dtype == np.float32


def test_batchnorm_without_a_pair_is_not_folded_into_a_quantised_layer(exported: Exported) -> None:
    assert operators(exported(Upsampling)[0])["BatchNormalization"] == 1
    assert operators(exported(Mixed)[0])["BatchNormalization"] == 0


def test_shift_follows_the_search_formula(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Conv2d(6, 4, 1))
    x = torch.randn(2, 6, 5, 5)
    shift = (9, 3, 7, 1)
    (record,) = record_all(layer, {}, shift_bit=shift)
    paths = export_quantized(layer, x, [record], {}, f"{tmp_path}/m", write_shift=True)
    deploy = tensors(paths[1])
    scale_w = np.asarray(record.scale_w, np.float32)
    deq = scale_w * np.float32(record.scale_d)
    q = np.clip(np.rint(x.numpy() / np.float32(record.scale_d)) + record.offset_d, -128, 127) - record.offset_d
    weight = np.clip(np.rint(layer[0].weight.detach().numpy() / scale_w.reshape(-1, 1, 1, 1)), -128, 127)
    accumulator = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], q)
    accumulator += np.rint(layer[0].bias.detach().numpy() / deq).reshape(1, -1, 1, 1)
    step = 2.0 ** np.asarray(shift).reshape(1, -1, 1, 1)
    expected = np.clip(np.floor(accumulator / step), -32768, 32767) * deq.reshape(1, -1, 1, 1) * step
    np.testing.assert_allclose(run(paths[0], x), expected, rtol=1e-6)
    np.testing.assert_array_equal(deploy["0.dequant.param"] >> np.uint64(32), shift)
    np.testing.assert_array_equal(deploy["0.dequant.param"].astype(np.uint32), deq.view(np.uint32))
    unshifted = export_quantized(layer, x, [record], {}, f"{tmp_path}/m")
    assert not (tensors(unshifted[1])["0.dequant.param"] >> np.uint64(32)).any()
    assert "Floor" not in operators(unshifted[0])


def test_fp16_mode_truncates_the_dequantisation_scale(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(4, 3))
    records = record_all(layer, {}, fakequant_precision_mode="FORCE_FP16_QUANT")
    paths = export_quantized(layer, torch.randn(2, 4), records, {}, f"{tmp_path}/m")
    word = int(tensors(paths[1])["0.dequant.param"][0])
    exact = int((np.float32(records[0].scale_d) * np.float32(records[0].scale_w[0])).view(np.uint32))
    assert word == exact & ~0x1FFF
    assert word != exact


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d, groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(4, 6, 3),
    "linear": lambda: nn.Linear(4, 6),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed, groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize(
    ("kind", "whole"), [(kind, whole) for kind in LAYERS for whole in (True, False) if whole or kind != "linear"]
)  # a Linear has one scale
@pytest.mark.parametrize("shift", [0, 1, 16])
@pytest.mark.parametrize("weight", [0.0, 1e-20])
def test_bias_of_a_dead_channel(kind: str, whole: bool, shift: int, weight: float) -> None:
    """It arrives as it is, in every channel where the layer is dead as a whole, and in the dead one otherwise."""
    torch.manual_seed(0)
    layer: Any = LAYERS[kind]()
    dead = torch.arange(6) if whole else torch.tensor([2, 5])
    with torch.no_grad():
        rows = layer.weight
        if "transposed" in kind:  # (in, out / groups, ...): output g * out / groups + j is column j of group g
            rows = layer.weight.view(layer.groups, 4 // layer.groups, 6 // layer.groups, 3, 3).swapaxes(1, 2)
            for channel in dead.tolist():
                rows[channel // (6 // layer.groups), channel % (6 // layer.groups)] = weight
        else:
            rows[dead] = weight
        layer.bias[dead] = torch.tensor([0.3, -0.2, 0.07, 0.1, -0.3, 0.01])[: len(dead)]
    scales = (1.0,) if whole else tuple(1.0 if c in dead else 0.001 for c in range(6))
    record = QuantRecord(
        key="x", scale_d=3.7, offset_d=0, scale_w=scales, offset_w=(0,) * len(scales), act_type="INT8", wts_type="INT8",
        shift_bit=(shift,) * len(scales), fakequant_precision_mode="FORCE_FP16_QUANT",
    )  # fmt: skip
    factors = layer_factors(record, layer, write_shift=True)
    steps = np.broadcast_to(factors.deq, 6)
    integers = factors.bias_integers
    if shift:
        integers = np.clip(np.floor(integers / 2.0**shift), -32768, 32767) * 2.0**shift
    error = np.abs(integers * steps - layer.bias.detach().numpy())[dead.numpy()]
    assert error.max() < (3e-5 if shift else 1e-7)
    if not whole:
        np.testing.assert_allclose(np.delete(steps, dead.numpy()), 3.7 * 0.001, rtol=1e-3)


def test_int4_weights_and_int16_activations(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Conv2d(6, 4, 1))
    x = torch.randn(1, 6, 2, 2)
    (record,) = record_all(layer, {}, act_type="INT16", wts_type="INT4", offset_d=-300, scale_d=0.001)
    scales = np.asarray(record.scale_w, np.float32) * 18
    record = QuantRecord(**{**vars(record), "scale_w": tuple(scales.tolist())})
    paths = export_quantized(layer, x, [record], {}, f"{tmp_path}/m")
    integers = tensors(paths[0])["0.weight"]
    assert integers.min() >= -8
    assert integers.max() <= 7
    packed = tensors(paths[1])["0.weight"].view(np.uint8)
    assert packed.shape == (4, 3, 1, 1)
    np.testing.assert_array_equal((packed & 15).astype(np.int8), integers[:, 0::2].astype(np.int8) & 15)
    np.testing.assert_array_equal((packed >> 4).astype(np.int8), integers[:, 1::2].astype(np.int8) & 15)
    assert b"INT16" in nodes(paths[1])["0.quant"].SerializeToString()
    clip = {
        name: numpy_helper.to_array(node.attribute[0].t) for name, node in nodes(paths[0]).items() if "_val" in name
    }
    assert sorted(float(value) for value in clip.values()) == [-32768.0, 32767.0]


def test_int4_activations_take_their_bias_as_float(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Conv2d(2, 4, 1))
    paths = export_quantized(
        layer, torch.randn(1, 2, 2, 2), record_all(layer, {}, act_type="INT4"), {}, f"{tmp_path}/m"
    )
    deploy = nodes(paths[1])
    assert deploy["0.bias_quant"].op_type == "Cast"
    assert list(deploy["0"].input) == ["0.quant.output0", "0.weight", "0.bias_quant.output0"]
    assert tensors(paths[1])["0.bias"].dtype == np.int32


def test_pack_int4_puts_the_even_index_low() -> None:
    packed = pack_int4(np.array([[1, -2], [3, 7]], np.int8), axis=1)
    assert packed.tolist() == [[(14 << 4 | 1) - 256], [7 << 4 | 3]]


def test_equal_tensors_of_two_layers_stay_apart(tmp_path: Path) -> None:
    """The optimiser merges equal initialisers and equal nodes; every layer must keep tensors and a node of its own."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, padding="same"), nn.Conv2d(3, 3, 1)).eval()
    model[1].load_state_dict(model[0].state_dict())
    records = record_all(model, {})
    x = torch.randn(1, 3, 4, 4)
    paths = export_quantized(model, x, records, {}, f"{tmp_path}/m")
    for path in paths:
        assert {"0", "1"} <= set(nodes(path))
        assert {name for name in tensors(path) if "dequant" not in name} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    np.testing.assert_allclose(run(paths[0], x), simulate(model, x, records, {}), atol=2e-5)


class Cache:
    """What torch.export does not know: a class of the user's own."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = list(tensors)


class Cached(Tokens):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        up = self.up(self.norm(x))
        return {"score": self.down(up), "cache": Cache(up, up + 1)}


def test_outputs_of_unknown_classes_become_the_tensors_in_them(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, x = Cached().eval(), torch.randn(SHAPES[Tokens])
    path = export_quantized(model, x, record_all(model, {}), {}, tmp_path / "m")[0]
    outputs = ort.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    assert [output.shape for output in outputs] == [(2, 5, 8), (2, 5, 12), (2, 5, 12)]
    np.testing.assert_allclose(outputs[2], outputs[1] + 1, rtol=1e-6)
    assert isinstance(model(x)["cache"], Cache)  # the caller's model returns what it did
