"""ONNX export against AMCT's files: its trained weights and factors in, its graphs and results out.

The float model is rebuilt from a checkpoint of AMCT and the factors come from its record, so nothing here
depends on our own training. Exporter differences that are accepted: tensor names; LayerNormalization is one operator;
constants of the model are initialisers, not Constant nodes.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from amct_ext.export.write import export_float, export_quantized
from amct_ext.record.text import parse_record
from amct_ext.record.types import QuantRecord, Record


def _names(text: str) -> list[str]:
    return text.split()


# One case per model and option; the other cases are the same graphs with other numbers and follow as slow ones.
QUICK = _names(
    "cnn_quant cnn_24_f2_quant_ulqw cnn_a16w8 cnn_arq_cwfalse cnn_filter_quant cnn_skips cnn_w4_arq "
    "concat_filter_quant conv1d_quant conv3d_quant deconv_quant encoder_quant group_quant mlp_ulqw_w4 mobile_24_quant "
    "odd_quant res_filter_quant res_24_quant reused_quant shared_quant"
)
SLOW = _names(
    "cnn_24_f0_quant shared_24_quant shared_override cnn_clip cnn_clip_fixedmin cnn_fixedmin_false "
    "cnn_fixedmin_true cnn_fp16_mode cnn_mixed_prune_quant "
    "cnn_only_data_cfg cnn_override_types cnn_quant_bn2 cnn_quant_bn2_early_eval cnn_skip_types cnn_two_evals cnn_ulqw "
    "cnn_ulqw_cwfalse cnn_ulqw_lr05 cnn_w4_ulqw concat_quant deconv_24_quant encoder_24_quant group_24_quant "
    "mlp_filter_quant mlp_quant mobile_quant odd_24_quant odd_filter_quant res_quant shared_quant_bn2 shared_rev_clip "
    "shared_rev_quant"
)
RECURRENT = ["gru_quant", "gru_cwfalse", "lstm_quant"]
PLAIN = ["cnn_24_f0", "cnn_filter_asc", "mlp_filter_asc", "res_filter_asc"]
LAYER_NORM = {"ReduceMean": 2, "Sub": 1, "Pow": 1, "Add": 2, "Sqrt": 1, "Div": 1, "Mul": 1}


@dataclass(frozen=True)
class Exported:
    """One golden case after our export."""

    records: tuple[QuantRecord, ...]
    graphs: dict[str, Any]
    fake_quant: Path
    deploy: Path
    data: dict[str, Any]
    results: dict[str, Any]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def float_model(golden: Path, case: str) -> tuple[nn.Module, dict[str, str], Record]:
    """AMCT's trained model with its wrappers taken off, the conv and BatchNorm pairs, and its record."""
    load, models = _module(golden / "load.py"), _module(golden / "models.py")
    facts, trained = load.facts(case), load.trained_state(case)
    record = parse_record(load.record(case, "after_eval"))
    # AMCT saved after an eval that may have refreshed the masks (QUIRKS 2)
    later = torch.load(golden / case / "state_after_eval_delta.pt", weights_only=True)
    trained.update({key: tensor for key, tensor in later.items() if key.endswith("wts_mask")})
    model, _ = models.build(facts["model"])
    modules = dict(model.named_modules())
    absorbed = [name for name in modules if f"{name}.bn_module.weight" in trained]
    emptied = [
        name
        for name, kind in facts["module_types"].items()
        if kind == "Identity" and isinstance(modules.get(name), _BatchNorm)
    ]
    pairs = dict(zip(absorbed, emptied, strict=True))
    state = {}
    for key, tensor in trained.items():
        if "acts_comp_reuse" in key:
            continue
        for conv, bn in pairs.items():
            key = key.replace(f"{conv}.bn_module.", f"{bn}.")
        key = key.replace(".quant_module.replaced_module.", ".").replace(".replaced_module.", ".")
        state[key] = tensor
    masks = {
        key.removesuffix("wts_mask").removesuffix("quant_module."): key for key in state if key.endswith("wts_mask")
    }
    for prefix, key in masks.items():
        if torch.isfinite(state[key]).all():
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * state[key]
    _resize(modules, state)
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model, pairs, record


def _resize(modules: dict[str, nn.Module], state: dict[str, torch.Tensor]) -> None:
    """Give the layers of a pruned model the shapes of its checkpoint."""
    for name, module in modules.items():
        for child, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if state[f"{name}.{child}"].shape != tensor.shape:
                tensor.data = state[f"{name}.{child}"].clone()
        if isinstance(module, _ConvNd) and not module.transposed:
            if module.groups > 1 and module.weight.shape[1] == 1:
                module.groups = module.weight.shape[0]
            module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, _BatchNorm):
            module.num_features = module.weight.shape[0]


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Exported]]:
    """Each case exported once, on first use."""
    load, done = _module(golden / "load.py"), {}

    def export(case: str) -> Exported:
        if case not in done:
            model, pairs, record = float_model(golden, case)
            graphs = json.loads((golden / case / "onnx_graphs.json").read_text())
            prefix = f"{tmp_path_factory.mktemp(case)}/m"
            sample = load.data(case)["sample_x"]
            sample = sample if isinstance(sample, torch.Tensor) else tuple(sample)
            if record.quant:
                paths = export_quantized(model, sample, record.quant, pairs, prefix)
            else:
                paths = export_float(model.eval(), sample, prefix)
            done[case] = Exported(record.quant, graphs, *paths, load.data(case), load.results(case))
        return done[case]

    yield export
    done.clear()


all_quant_cases = pytest.mark.parametrize(
    "case", [*QUICK, *RECURRENT, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
quant_cases = pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])


def counts(graph: Any) -> Counter[str]:
    """Operators of a golden graph; of Constant nodes only those that quantisation put there."""
    kept = (node["op"] for node in graph["nodes"] if node["op"] != "Constant" or "fake" in node["name"])
    return Counter(kept)


def our_counts(model: onnx.ModelProto) -> Counter[str]:
    """Operators of our graph, with LayerNormalization written out as AMCT's exporter does."""
    found = Counter(node.op_type for node in model.graph.node)
    for _ in range(found.pop("LayerNormalization", 0)):
        found.update(LAYER_NORM)
    return found


def layer_tensors(entries: Any) -> Counter[tuple[str, tuple[int, ...]]]:
    """Types and shapes of initialisers, leaving out the model's own constants (scalars and integer shapes)."""
    return Counter((kind, tuple(dims)) for kind, dims in entries if dims and kind != "INT64")


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@all_quant_cases
def test_graphs_have_amcts_operators_and_tensors(case: str, exported: Callable[[str], Exported]) -> None:
    ours = exported(case)
    for path, kind in ((ours.fake_quant, "fake_quant"), (ours.deploy, "deploy")):
        model, graph = onnx.load(path), ours.graphs[kind]
        assert our_counts(model) == counts(graph)
        tensors = [(onnx.TensorProto.DataType.Name(t.data_type), list(t.dims)) for t in model.graph.initializer]
        assert layer_tensors(tensors) == layer_tensors(graph["initializers"].values())
        prefixes = tuple(f"{record.key}{end}" for record in ours.records for end in (".quant", ".dequant", ".fake"))
        keys = {record.key for record in ours.records}
        expected = {n["name"] for n in graph["nodes"] if n["name"] in keys or n["name"].startswith(prefixes)}
        assert expected == {n.name for n in model.graph.node if n.name in keys or n.name.startswith(prefixes)}


@all_quant_cases
def test_fake_quant_model_computes_what_amcts_did(case: str, exported: Callable[[str], Exported]) -> None:
    ours = exported(case)
    session = ort.InferenceSession(str(ours.fake_quant))
    inputs = ours.data["eval_x"]
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    names = [value.name for value in session.get_inputs()]
    output = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})[0]
    expected = ours.results["ort_fake_quant_out"]
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-6)


@quant_cases
def test_deploy_attributes_and_words_follow_the_record(case: str, exported: Callable[[str], Exported]) -> None:
    ours = exported(case)
    model = onnx.load(ours.deploy)
    tensors, nodes = initializers(model), {node.name: node for node in model.graph.node}
    for record in ours.records:
        deq = np.asarray(record.scale_w, np.float32) * np.float32(record.scale_d)
        np.testing.assert_array_equal(tensors[f"{record.key}.dequant.param"], deq.view(np.uint32).astype(np.uint64))
        source = nodes[record.key].input[0]
        quant = nodes[source.removesuffix(".output0")]
        found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in quant.attribute}
        assert found == {
            "scale": np.float32(1) / np.float32(record.scale_d),
            "offset": float(record.offset_d),
            "dst_type": record.act_type.encode(),
        }


def test_every_integer_and_constant_equals_amcts_file(exported: Callable[[str], Exported], golden: Path) -> None:
    ours = exported("cnn_quant")
    for path in (ours.fake_quant, ours.deploy):
        theirs_file = onnx.load(golden / "cnn_quant" / path.name)
        expected = {name.replace(".sub_module", ""): array for name, array in initializers(theirs_file).items()}
        found = initializers(onnx.load(path))
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        theirs = {node.name: node for node in theirs_file.graph.node}
        for node in onnx.load(path).graph.node:
            for attribute in node.attribute if node.op_type in ("AscendQuant", "AscendDequant", "Constant") else ():
                other = next(a for a in theirs[node.name].attribute if a.name == attribute.name)
                if attribute.HasField("t"):
                    np.testing.assert_array_equal(numpy_helper.to_array(attribute.t), numpy_helper.to_array(other.t))
                else:
                    assert onnx.helper.get_attribute_value(attribute) == onnx.helper.get_attribute_value(other)


@pytest.mark.parametrize("case", PLAIN)
def test_pruned_models_export_amcts_plain_graph(case: str, exported: Callable[[str], Exported]) -> None:
    ours = exported(case)
    assert our_counts(onnx.load(ours.deploy)) == counts(ours.graphs["deploy"])
    inputs = ours.data["eval_x"]
    tensor = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    session = ort.InferenceSession(str(ours.fake_quant))
    output = session.run(None, {session.get_inputs()[0].name: tensor.numpy()})[0]
    np.testing.assert_allclose(output, ours.results["eval_out"].numpy(), atol=1e-5)
