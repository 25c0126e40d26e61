"""Public functions called inside torch.inference_mode(): what they return trains like what is made outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small
from torch import Tensor, nn

import amct_ext


def build() -> nn.Sequential:
    """The first step writes into the input."""
    torch.manual_seed(0)
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def data() -> Tensor:
    return torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(data()).pow(2).mean().backward()
        optimizer.step()
    return model.state_dict()


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[key].nan_to_num(7), value.nan_to_num(7)) for key, value in theirs.items())


@pytest.mark.parametrize("built_inside", [False, True])
@pytest.mark.parametrize("name", ["quant", "two_batches", "sparse_learned", "filter_quant"])
def test_create_and_restore(tmp_path: Path, name: str, built_inside: bool) -> None:
    config, record = str(tmp_path / "c.cfg"), str(tmp_path / "r.txt")
    (tmp_path / "c.cfg").write_text(small.CONFIGS[name])
    net = build()
    with torch.inference_mode():
        inside = build() if built_inside else net
        model = amct_ext.create_compressed_retrain_model(inside, data(), config, record)
    twin = amct_ext.create_compressed_retrain_model(net, data(), config, record)
    want = train(twin)
    assert agree(train(model), want)
    torch.save(want, tmp_path / "s.pth")
    with torch.inference_mode():
        restored = amct_ext.restore_compressed_retrain_model(inside, data(), config, record, str(tmp_path / "s.pth"))
    assert agree(restored.state_dict(), want)
    assert agree(train(restored), train(twin))


def test_the_other_flows(tmp_path: Path) -> None:
    json, record, config = str(tmp_path / "c.json"), str(tmp_path / "r.txt"), str(tmp_path / "c.cfg")
    (tmp_path / "c.cfg").write_text(small.SPARSE % 0)
    with torch.inference_mode():
        x = data()
        amct_ext.create_quant_retrain_config(json, build(), x)
        quantised = amct_ext.create_quant_retrain_model(json, build(), record, x)
        sparse = amct_ext.create_prune_retrain_model(build(), x, config, record)
        assert amct_ext.explain(build(), x, config)["1"].pruned
    train(sparse)
    train(quantised)
    with torch.inference_mode():
        quantised.eval()(x)
        amct_ext.save_quant_retrain_model(json, quantised, record, str(tmp_path / "net"), x)
        amct_ext.save_prune_retrain_model(sparse, str(tmp_path / "sparse"), x)
    train(quantised)


def test_ratio_search(tmp_path: Path) -> None:
    (tmp_path / "s.cfg").write_text("compress_ratio: 1.3\nascend_optimized: false\nmax_prune_ratio: 0.5\n")
    found: list[Any] = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            batch = [data(), torch.zeros(4, 4, 4, 4)]
            out = tmp_path / f"{mode}.cfg"
            amct_ext.auto_channel_prune_search(build(), str(tmp_path / "s.cfg"), batch, str(out))
        found.append(out.read_text())
    assert found[0] == found[1]
