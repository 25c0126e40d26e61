"""What is done to a model around create: adapters, exchanged layers, wrappers, odd names, tensors without values."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.linear_job import Change, Job, X, build, close, train
from torch import Tensor, nn

import amct_ext
from amct_ext.errors import ModelError

# -- adapters and exchanged layers


class Adapter(nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)


class Lora(Adapter):
    merged = False


def put(index: int, make: Callable[[Any], nn.Module]) -> Change:
    def change(model: Any) -> None:
        model[index] = make(model[index])

    return change


@pytest.mark.parametrize(("flow", "index"), [("compressed", 0), ("compressed", 2), ("quant", 0)])
@pytest.mark.parametrize("make", [Adapter, lambda old: nn.Linear(8, old.out_features)])
def test_wrapped_or_exchanged(tmp_path: Path, make: Any, index: int, flow: str, caplog: Any) -> None:
    """Evaluation and save work; the record keeps the names of create."""
    job = Job(tmp_path)
    if flow == "quant":
        amct_ext.create_quant_retrain_config(f"{job.config}.json", build(), X)
        model: Any = amct_ext.create_quant_retrain_model(f"{job.config}.json", build(), job.record, X)
    else:
        model = job.create(build())
    put(index, make)(model)
    train(model)
    want = model.eval()(X)
    wrapped = make is Adapter
    assert (f'key: "{index}"' in Path(job.record).read_text()) is wrapped
    with caplog.at_level(logging.WARNING):
        if flow == "quant":
            amct_ext.save_quant_retrain_model(f"{job.config}.json", model, job.record, job.out, X)
        else:
            assert close(job.save(model), want)
    assert (f"layer '{index}', compressed at create, is no longer" in caplog.text) is not wrapped
    assert bool(amct_ext.explain(model)[str(index)].quantised) is wrapped
    amct_ext.to_amct_state_dict(model)


def test_wrapped_in_front_of_its_batch_norm(tmp_path: Path) -> None:
    class Wrap(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    x = torch.randn(4, 4, 6, 6)
    job = Job(tmp_path)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = amct_ext.create_compressed_retrain_model(net, x, job.config, job.record)
    model[0] = Wrap(model[0])
    model.train()(x)
    model.eval()(x)
    state = amct_ext.to_amct_state_dict(model)
    assert "0.inner.bn_module.running_var" in state
    amct_ext.save_compressed_retrain_model(model, job.record, job.out, x)


def test_an_adapter_that_is_not_merged_and_a_copied_layer(tmp_path: Path) -> None:
    job = Job(tmp_path)
    model = job.create(build())
    put(0, Lora)(model)
    train(model)
    model.eval()(X)
    with pytest.raises(ModelError, match=r"'0' is inside an adapter \(Lora\)"):
        job.save(model)
    model = job.create(build())
    model.append(nn.Linear(4, 8)).append(copy.deepcopy(model[0]))
    train(model)
    model.eval()(X)
    with pytest.raises(ModelError, match=r"'4' is a copy of the compressed layer '0'"):
        job.save(model)


def test_lora_of_peft(tmp_path: Path) -> None:
    """Adapters change nothing before they are trained; merged, they are part of what is quantised and saved."""
    peft = pytest.importorskip("peft", reason="adapters are peft's: pip install -e .[frameworks]")
    job = Job(tmp_path)
    model = job.create(build())
    train(model)
    want = model.eval()(X).detach()
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    assert torch.equal(model.eval()(X), want)
    train(model)
    model.eval()(X)
    with pytest.raises(ModelError, match="merge"):
        job.save(model)
    model[0].merge()
    model.train()(X)
    want = model.eval()(X)
    assert close(job.save(model), want)
    model[0] = model[0].get_base_layer()
    assert close(job.save(model), want)


def test_a_model_around_the_compressed_one_is_named(tmp_path: Path) -> None:
    class Forwards(nn.Module):
        """Hands attributes on, as peft's wrappers do."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    with pytest.raises(ModelError, match="its submodule 'inner' was"):
        amct_ext.explain(Forwards(Job(tmp_path).create(build())))


# -- names and values


def test_a_layer_called_like_a_setting(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("batch_num", nn.Linear(8, 8))
    with pytest.raises(ValueError, match="batch_num"):
        amct_ext.create_quant_retrain_config(str(tmp_path / "c.json"), net, X)


def test_meta_tensors_are_refused_by_name(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for module, name in ((nn.Linear(8, 8, device="meta"), "1.weight"), (nn.BatchNorm1d(8, device="meta"), "1.weight")):
        with pytest.raises(ModelError, match=f"'{name}' is on the meta device"):
            job.create(nn.Sequential(nn.Linear(8, 8), module))
