"""What explain says of each layer, and that the reasons are those that decided."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.checks.rejection import rejected
from support.models import small
from torch import Tensor, nn

import amct_ext


class Awkward(nn.Module):
    """A layer for each reason to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.circular = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.twice = nn.Conv2d(16, 16, 1)
        self.sorted = nn.Conv2d(16, 16, 1)
        self.unused = nn.Linear(4, 4)
        self.line = nn.Conv1d(16, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(self.circular(torch.relu(self.first(x)))))
        x = self.twice(self.twice(x))
        x = self.sorted(x).sort(dim=1).values
        return self.fc(self.line(x.flatten(2)).mean(2))


def explained(folder: Path, text: str, model: nn.Module | None = None) -> amct_ext.Explanation:
    (folder / "job.cfg").write_text(text)
    return amct_ext.explain(model or small.build(), small.SAMPLE, folder / "job.cfg")


def test_what_was_done(tmp_path: Path) -> None:
    report = explained(tmp_path, small.CONFIGS["mixed_quant"])
    assert list(report) == ["stem", "conv1", "conv2", "down", "fc"]
    assert report["conv1"].quantised == "INT8 input, INT8 weight per channel (arq_retrain)"
    assert report["conv1"].pruned == "5 of 16 output channels removed, 2 input channels removed"
    assert report["fc"].pruned == "2:4 sparse, 5 input channels removed"
    assert not any(item.left_alone or item.not_quantised or item.not_pruned for item in report.values())


def test_awkward_layers(tmp_path: Path) -> None:
    report = explained(tmp_path, small.FILTER + small.QUANT, Awkward())
    assert "padding_mode is 'circular'" in report["circular"].not_quantised
    assert "5 of 16 output channels removed" in report["first"].pruned
    assert report["circular"].pruned == "5 of 16 output channels removed, 5 input channels removed"
    assert "depthwise" in report["depthwise"].not_pruned
    assert "2 times" in report["twice"].not_quantised and "5 of 16 output channels" in report["twice"].pruned
    assert report["sorted"].quantised and "sort" in report["sorted"].not_pruned
    assert report["unused"].left_alone and "not called" in report["unused"].not_quantised
    assert report["line"].quantised and "2 of 8 output channels" in report["line"].pruned
    assert "output of the model" in report["fc"].not_pruned


@pytest.mark.parametrize(
    ("text", "layer", "quant", "prune"),
    [
        (small.QUANT, "conv1", "", "no pruning is asked for"),
        (small.FILTER, "conv1", "no quantisation is asked for", ""),
        (small.QUANT + 'quant_skip_layers: "conv1"\n', "conv1", "named in quant_skip_layers", None),
        (small.QUANT + 'skip_layer_types: "Linear"\n', "fc", "its type Linear is named in skip_layer_types", None),
        (small.FILTER + 'regular_prune_skip_layers: "conv1"\n', "conv1", None, "named in regular_prune_skip_layers"),
        (small.MIXED, "conv1", None, "no settings of the configuration reach it"),
        ('override_layer_configs { layer_name: "fc" retrain_data_quant_config { } }\n', "conv1",
         "no settings of the configuration reach it", None),
        (small.FILTER.replace("false", "true").replace("0.3", "0.1"), "conv1", None, "rounding keeps all 16 channels"),
    ],
)  # fmt: skip
def test_configured_reasons(tmp_path: Path, text: str, layer: str, quant: str | None, prune: str | None) -> None:
    report = explained(tmp_path, text)[layer]
    assert quant is None or report.not_quantised == quant
    assert prune is None or report.not_pruned == prune
    assert bool(report.quantised) != bool(report.not_quantised)


def test_json_reasons(tmp_path: Path) -> None:
    (tmp_path / "quant.json").write_text(
        '{"version": 1, "batch_num": 1, "stem": {}, "conv1": {"retrain_enable": false}}'
    )
    report = amct_ext.explain(small.build(), small.SAMPLE, str(tmp_path / "quant.json"))
    assert report["stem"].quantised
    assert "retrain_enable is false" in report["conv1"].not_quantised
    assert "does not name it" in report["conv2"].not_quantised


def test_compressed_models_know_it_themselves(tmp_path: Path) -> None:
    expected = explained(tmp_path, small.CONFIGS["filter_quant"])
    assert list(tmp_path.iterdir()) == [tmp_path / "job.cfg"]  # the dry run writes nothing
    config, record = str(tmp_path / "job.cfg"), str(tmp_path / "record.txt")
    model = amct_ext.create_compressed_retrain_model(small.build(), small.SAMPLE, config, record)
    torch.save(model.state_dict(), tmp_path / "state.pth")
    restored = amct_ext.restore_compressed_retrain_model(
        small.build(), small.SAMPLE, config, record, str(tmp_path / "state.pth")
    )
    for each in (model, copy.deepcopy(model), restored):
        assert amct_ext.explain(each) == expected


def test_table(tmp_path: Path) -> None:
    first, blank, *lines = str(explained(tmp_path, small.CONFIGS["filter_quant"])).splitlines()
    assert first == "INT8: 100.0 % of weights, 100.0 % of MACs" and not blank
    assert lines[0].replace("|", " ").split() == ["layer", "type", "weights", "quantised", "pruned"]
    assert len(lines) == 7 and len({len(line) for line in lines}) == 1
    assert "no: its channels are an output of the model" in lines[-1]


def test_float_models_need_the_rest(tmp_path: Path) -> None:
    with rejected(tmp_path, RuntimeError, "create_*"):
        amct_ext.explain(small.build())
    with rejected(tmp_path, RuntimeError, "create_*"):
        amct_ext.explain(small.build(), small.SAMPLE)
