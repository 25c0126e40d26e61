"""Shares of weights and multiplications that are quantised, and the weights that stay float, layers' or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models import small
from support.models.net_of_function import Net
from torch import Tensor, nn

import amct_ext


def report(folder: Path, model: nn.Module, x: Tensor, text: str = small.QUANT) -> amct_ext.Explanation:
    (folder / "job.cfg").write_text(text)
    return amct_ext.explain(model, x, folder / "job.cfg")


def weights(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(shape) * 0.1) for name, shape in zip("uvw", shapes, strict=False)}


Run = Callable[[nn.Module, Tensor], Tensor]


@pytest.mark.parametrize(
    ("run", "shapes", "x", "macs"),
    [
        (lambda net, x: F.linear(net.fc(x), net.u), [(3, 4)], (5, 4), [60]),
        (lambda net, x: torch.addmm(net.b, net.fc(x), net.u), [(4, 3)], (5, 4), [60]),
        (lambda net, x: net.fc(x) @ net.u.abs(), [(4, 3)], (2, 5, 4), [120]),
        (lambda net, x: torch.bmm(net.fc(x).expand(6, -1, -1), net.u), [(6, 4, 3)], (5, 4), [360]),
        (lambda net, x: torch.einsum("btd,dh->bth", net.fc(x), net.u), [(4, 3)], (2, 5, 4), [120]),
        (lambda net, x: F.conv2d(net.fc(x), net.u, groups=2), [(6, 1, 3, 1)], (1, 2, 5, 4), [6 * 3 * 4 * 3]),
        (lambda net, x: F.conv_transpose1d(net.fc(x), net.u), [(2, 6, 3)], (1, 2, 4), [8 * 6 * 3]),
        (lambda net, x: F.linear(net.fc(x), net.u @ net.v), [(3, 2), (2, 4)], (5, 4), [30, 30 + 10]),
    ],
    ids=["linear", "addmm", "derived", "experts", "einsum", "conv", "transposed", "low_rank"],
)  # fmt: skip
def test_a_parameter_that_is_no_layers(
    tmp_path: Path, run: Run, shapes: list[tuple[int, ...]], x: tuple[int, ...], macs: list[int]
) -> None:
    net = Net(run, fc=nn.Linear(4, 4), **weights(*shapes), b=nn.Parameter(torch.zeros(3)))
    found = report(tmp_path, net, torch.randn(x))
    total = 16 + sum(torch.Size(shape).numel() for shape in shapes)
    multiplied = torch.Size(x).numel() * 4 + sum(macs[: len(shapes)])
    for name, shape in zip("uv", shapes, strict=False):
        assert found[name].left_alone and "multiplies by it" in found[name].not_quantised
        assert found[name].share == torch.Size(shape).numel() / total
        assert ("a matrix for each item" in found[name].not_quantised) == (shape == (6, 4, 3))
    assert found.coverage.weights["INT8"] == 16 / total
    if len(shapes) == 1:
        assert found.coverage.macs["INT8"] == torch.Size(x).numel() * 4 / multiplied
    assert str(found).startswith("INT8: ") and all(f"{name} " in str(found.coverage) for name in "uv"[: len(shapes)])


def test_attention_is_named(tmp_path: Path) -> None:
    """What is multiplied in it: by its weights, which its projections hold, and activations by activations."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    found = report(tmp_path, Block(), torch.randn(2, 5, 8))
    assert {"attention.in_proj", "attention.out_proj", "fc"} == set(found)
    assert sum(item.share or 0 for item in found.values()) == 1
    assert found.coverage.activation_macs == 2 * 5 * 5 * 16 / (2 * 5 * 5 * 16 + 10 * 64 * 5)


def test_a_tied_weight_counts_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False))
    net[2].weight = net[0].weight
    found = report(tmp_path, net, torch.randint(0, 10, (2, 3)))
    assert found["0"].share == 0 and found["2"].share == 40 / 56 and found["1"].quantised
    assert "looked up" in found["0"].not_quantised and "shared with 0" in found["2"].not_quantised


def test_an_embedding_is_named_as_a_look_up(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.Linear(6, 2))
    found = report(tmp_path, net, torch.randint(0, 10, (2, 3)), small.QUANT + 'quant_skip_layers: "2"\n')
    assert "looked up" in found["0"].not_quantised and found["0"].share == 40 / 76
    assert found["2"].not_quantised == "named in quant_skip_layers" and found["2"].share == 12 / 76
    assert str(found.coverage) == (
        "INT8: 31.6 % of weights, 66.7 % of MACs; float: 68.4 % of weights: 0 52.6 %, 2 15.8 %"
    )


def test_weights_of_two_formats(tmp_path: Path) -> None:
    text = small.QUANT + (
        'override_layer_configs { layer_name: "1" retrain_data_quant_config { ulq_quantize { } } '
        "retrain_weight_quant_config { arq_retrain { dst_type: INT4 } } }\n"
    )
    found = report(tmp_path, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), text)
    assert str(found.coverage) == "INT8: 50.0 % of weights, 50.0 % of MACs; INT4: 50.0 % of weights, 50.0 % of MACs"
