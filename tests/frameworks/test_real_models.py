"""Third-party architectures as they come go through the whole job: create, train, eval, restore, save, onnxruntime."""

from __future__ import annotations

import itertools
from pathlib import Path

import model_table
import onnx
import pytest
import real_models
import torch
import torch.nn.functional as F
from support.checks import agreement
from support.models import small as small_models
from torch import Tensor, nn

import amct_ext

pytest.importorskip("transformers", reason="the architectures come from the transformers package: pip install .[dev]")

CONFIGS = {
    "quant": small_models.QUANT,
    "filter": small_models.FILTER + small_models.QUANT,
    "2:4": small_models.SPARSE % 2 + small_models.QUANT,
}
# What must be compressed at least: (quantised, filter-pruned, 2:4) layers. Reasons for the rest are asserted to exist.
AT_LEAST = {
    "ResNet": (20, 19, 20),
    "MobileNetV2": (53, 35, 53),
    "ConvNeXt": (20, 14, 20),
    "EfficientNet": (42, 33, 42),
    "RegNet": (31, 30, 31),
    "ViT": (14, 13, 14),
    "Swin": (27, 26, 27),
    "BERT": (14, 13, 14),
    "Llama": (15, 8, 15),
    "Llama, tied": (14, 4, 14),
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "migration.md"
DEEP = ("MobileNetV2", "EfficientNet", "Swin")


def jobs() -> list:
    """All pairs; the second and third configuration of the deep ones is slow."""
    pairs = itertools.product(real_models.NAMES, CONFIGS)
    return [
        pytest.param(name, kind, marks=[pytest.mark.slow] if name in DEEP and kind != "quant" else [])
        for name, kind in pairs
    ]


def logits(model: nn.Module, data: Tensor) -> Tensor:
    return real_models.first_tensor(model(data))


def train(model: nn.Module, name: str, steps: int) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for i in range(steps):
        output = logits(model, real_models.sample(name, i + 1)).flatten(0, -2)
        optimizer.zero_grad()
        F.cross_entropy(output, torch.arange(len(output)) % output.shape[-1]).backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "kind"), jobs())
def test_whole_job(name: str, kind: str, tmp_path: Path) -> None:
    config, record, checkpoint = (str(tmp_path / file) for file in ("compress.cfg", "record.txt", "state.pth"))
    Path(config).write_text(CONFIGS[kind])
    data, unseen = real_models.sample(name), real_models.sample(name, 50)
    whole = real_models.build(name)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    model = amct_ext.create_compressed_retrain_model(whole, data, config, record)
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items())
    assert type(model) is type(whole)
    train(model, name, 2)
    model.eval()
    with torch.no_grad():
        expected = logits(model, unseen)
    torch.save({"state_dict": model.state_dict()}, checkpoint)

    restored = amct_ext.restore_compressed_retrain_model(
        real_models.build(name, 1), data, config, record, checkpoint, "state_dict"
    )
    with torch.no_grad():
        assert torch.equal(logits(restored.eval(), unseen), expected)

    amct_ext.save_compressed_retrain_model(restored, record, str(tmp_path / "net"), data)
    agreed = agreement.compare(restored, Path(record), tmp_path / "net_fake_quant_model.onnx", unseen)
    assert agreed.error <= agreement.CLOSE, agreed
    assert agreed.ties <= agreed.values * 1e-3, agreed
    deploy = onnx.load(tmp_path / "net_deploy_model.onnx")
    operators = [node.op_type for node in deploy.graph.node]
    assert operators.count("AscendDequant") == len(agreement.read_record(record).quant) >= AT_LEAST[name][0]


@pytest.mark.parametrize("name", real_models.NAMES)
def test_every_layer_is_accounted_for(name: str, tmp_path: Path) -> None:
    """At least so many layers are quantised, pruned and sparse, and each other one has a reason."""
    quantised, pruned, sparse = AT_LEAST[name]
    for kind, wanted in (("filter", pruned), ("2:4", sparse)):
        config = tmp_path / "compress.cfg"
        config.write_text(CONFIGS[kind])
        report = amct_ext.explain(real_models.build(name), real_models.sample(name), config).values()
        assert sum(bool(layer.quantised) for layer in report) >= quantised
        assert sum(bool(layer.pruned) and not layer.not_pruned for layer in report) >= wanted
        assert all(layer.quantised or layer.not_quantised for layer in report)
        assert all(layer.pruned or layer.not_pruned for layer in report)


def test_a_tied_head_stays_float_with_the_reason(tmp_path: Path) -> None:
    config = tmp_path / "compress.cfg"
    config.write_text(CONFIGS["2:4"])
    name = "Llama, tied"
    head = amct_ext.explain(real_models.build(name), real_models.sample(name), config)["lm_head"]
    assert head.left_alone
    assert head.not_quantised == head.not_pruned == "its weight is shared with model.embed_tokens"
    model = amct_ext.create_compressed_retrain_model(
        real_models.build(name), real_models.sample(name), str(config), str(tmp_path / "record.txt")
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    config = tmp_path / "compress.cfg"
    config.write_text(CONFIGS["filter"])
    model = real_models.build("ResNet")
    frozen = [name for name, _ in model.named_parameters() if name.startswith("resnet.embedder")]
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    model = amct_ext.create_compressed_retrain_model(
        model, real_models.sample("ResNet"), str(config), str(tmp_path / "record.txt")
    )
    assert not any(model.get_parameter(name).requires_grad for name in frozen)
    start = [model.get_parameter(name).clone() for name in frozen]
    train(model, "ResNet", 2)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in zip(frozen, start, strict=True))


@pytest.mark.parametrize("name", ["BERT", "Llama, tied"])
def test_the_migration_guide_has_what_the_tool_prints(tmp_path: Path, name: str) -> None:
    (row,) = [line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {name} |")]
    assert model_table.row(name, tmp_path) == row


def test_the_migration_guide_has_every_model() -> None:
    rows = [line.split("|")[1:-1] for line in DOCUMENT.read_text().splitlines()]
    table = {cells[0].strip(): cells[1:] for cells in rows if len(cells) == 7 and cells[0].strip() in AT_LEAST}
    counts = {name: tuple(int(cells[i]) for i in (1, 2, 4)) for name, cells in table.items()}
    assert counts == AT_LEAST
