"""Training stacks with their real packages: what each does to a model's state, mode and classes must not matter."""

from __future__ import annotations

import copy
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, train
from support.models import small
from torch import Tensor, nn

import amct_ext

CONFIGS = {
    "quant": small.QUANT,
    "learned": small.LEARNED,
    "two batches": "batch_num: 2\n" + small.QUANT,
    "sparse": "batch_num: 2\n" + small.SPARSE % 2 + small.LEARNED,
}
MISSING = "a training stack is missing: pip install -e .[frameworks]"
every_config = pytest.mark.parametrize("name", CONFIGS)


def clips(model: nn.Module) -> dict[str, float]:
    return {key: round(float(v), 5) for key, v in model.state_dict().items() if key.endswith("act_quant.clip_max")}


# -- accelerate


@every_config
def test_accelerate_saves_and_loads_at_any_point(tmp_path: Path, name: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason=MISSING)
    job = Job(tmp_path, CONFIGS[name])

    def start() -> tuple[Any, nn.Module, Any]:
        model = job.create()
        model.drop.p = 0.0
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer_of(model))

    def steps(accelerator: Any, model: nn.Module, optimizer: Any, which: range) -> None:
        model.train()
        for i in which:
            x, y = small.batch(i)
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()

    one, two = start(), start()
    steps(*one, range(2))
    one[0].save_state(str(tmp_path / "state"))  # safetensors, which drop empty and shared tensors
    two[0].load_state(str(tmp_path / "state"))
    assert_same_state(one[1], two[1])
    for each in (one, two):
        steps(*each, range(2, 5))
    assert_same_state(one[1], two[1])
    assert torch.equal(evaluate(one[1]), evaluate(two[1]))


# -- Lightning


def test_lightnings_sanity_check_calibrates_nothing(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason=MISSING)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small.build()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("score", self(batch[0]).mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    def loader(gain: float) -> Any:
        x = torch.cat([small.batch(i)[0] for i in range(3)]) * gain
        y = torch.cat([small.batch(i)[1] for i in range(3)])
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)

    job, seen = Job(tmp_path, CONFIGS["two batches"]), []
    for sanity in (0, 2):
        model = amct_ext.create_compressed_retrain_model(Module(), small.SAMPLE, str(job.config), str(job.record))
        torch.manual_seed(0)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=sanity,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, loader(1.0), loader(0.01))
        seen.append(clips(model))
        evaluate(model)
        amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "net"), small.SAMPLE)
    assert seen[0] == seen[1]


# -- timm


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for torchvision, which timm imports everywhere and its averages do not use.

    The wheel in the package index links CUDA and does not load beside a CPU build of torch.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __version__="0")

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture
def timm_utils(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is missing: pip install --no-deps timm (make venv does)")
    before = set(sys.modules)
    if importlib.util.find_spec("torchvision") is None:
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Absent()])
    yield importlib.import_module("timm.utils")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("timm", "torchvision"):
            del sys.modules[name]


@every_config
@pytest.mark.parametrize("foreach", [True, False])
def test_timms_average_made_before_the_first_step(
    tmp_path: Path, name: str, foreach: bool, timm_utils: ModuleType
) -> None:
    job = Job(tmp_path, CONFIGS[name])
    model = job.create()
    average = timm_utils.ModelEmaV3(model, decay=0.5, foreach=foreach)
    optimizer = optimizer_of(model)
    for i in range(6):
        train(model, optimizer, range(i, i + 1))
        average.update(model)
    before = clips(average.module)
    loud = 10 * small.batch(7)[0]
    with torch.no_grad():
        seen = average.module.eval()(loud)
    assert clips(average.module) == before
    fresh = job.create()
    fresh.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(loud), seen)
    own = str(tmp_path / "average.txt")
    amct_ext.update_record(average.module, own)
    amct_ext.save_compressed_retrain_model(average.module, own, str(tmp_path / "average"), small.SAMPLE)


# -- peft


@pytest.mark.parametrize("name", ["quant", "learned"])
def test_adapters_on_a_compressed_model(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft", reason=MISSING)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.o((self.q(x) * self.v(x).sigmoid()).relu())

    job, x = Job(tmp_path, CONFIGS[name]), torch.randn(32, 16)
    model = amct_ext.create_compressed_retrain_model(Net(), x, str(job.config), str(job.record)).train()
    model(x)
    want = model.eval()(x)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q", "v"]), model)
    assert torch.equal(adapted.eval()(x), want)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.train()(x).square().mean().backward()
        optimizer.step()
    trained = adapted.eval()(x)
    assert not torch.equal(trained, want)
    with pytest.raises(amct_ext.AmctError, match=r"layer 'q' is inside an adapter .*merge"):
        amct_ext.save_compressed_retrain_model(adapted, str(job.record), str(tmp_path / "net"), x)
    for module in adapted.modules():
        if hasattr(module, "merge"):
            module.merge()
    merged = adapted.eval()(x)
    assert (merged - trained).abs().max() < 0.1 * trained.abs().max()  # the sum is quantised now, not the first weight
    amct_ext.update_record(adapted)  # peft writes through `.data`, which raises no version
    amct_ext.save_compressed_retrain_model(adapted, str(job.record), str(tmp_path / "net"), x)


# -- Hugging Face Trainer


@pytest.mark.parametrize("name", ["two batches", "sparse"])
def test_the_trainers_gradient_checkpointing_changes_nothing(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason=MISSING)
    pytest.importorskip("accelerate", reason=MISSING)
    transformers.logging.set_verbosity_error()

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            row = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": row, "attention_mask": torch.ones(8, dtype=torch.long), "labels": torch.tensor(i % 3)}

    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            num_labels=3, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    sample = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    job, models = Job(tmp_path, CONFIGS[name]), []
    for on in (False, True):
        model = amct_ext.create_compressed_retrain_model(
            copy.deepcopy(net), tuple(sample.values()), str(job.config), str(job.record)
        )
        options = transformers.TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=3, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_strategy="no", gradient_checkpointing=on,
            learning_rate=0.01, optim="sgd", seed=0,
        )  # fmt: skip
        transformers.Trainer(model, options, train_dataset=Data()).train()
        models.append(model)
    compare: Callable[[nn.Module], list[Tensor]] = lambda m: [v.nan_to_num(7) for v in m.state_dict().values()]  # noqa: E731
    for key, one, two in zip(models[0].state_dict(), *map(compare, models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=key)
