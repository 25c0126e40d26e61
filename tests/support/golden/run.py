"""Drives one golden case through our flow, by the protocol of the golden data (5 SGD steps, eval, save, restore)."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import amct_ext


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def case_names() -> list[str]:
    """Names are listed here, not read from the folder, so that collection does not need the golden data."""
    return [
        "cnn_24_f0",
        "cnn_24_f0_quant",
        "cnn_24_f2",
        "cnn_24_f2_quant_ulqw",
        "cnn_a16w8",
        "cnn_a4w4",
        "cnn_a4w8_error",
        "cnn_arq_cwfalse",
        "cnn_clip",
        "cnn_clip_fixedmin",
        "cnn_filter_asc",
        "cnn_filter_noasc",
        "cnn_filter_quant",
        "cnn_fixedmin_false",
        "cnn_fixedmin_true",
        "cnn_fp16_mode",
        "cnn_linear_cw_error",
        "cnn_mixed_prune",
        "cnn_mixed_prune_quant",
        "cnn_only_data_cfg",
        "cnn_override_prune",
        "cnn_override_types",
        "cnn_quant",
        "cnn_quant_bn2",
        "cnn_quant_bn2_early_eval",
        "cnn_skip_types",
        "cnn_skips",
        "cnn_two_evals",
        "cnn_ulqw",
        "cnn_ulqw_cwfalse",
        "cnn_ulqw_lr05",
        "cnn_w4_arq",
        "cnn_w4_ulqw",
        "concat_filter_asc",
        "concat_filter_quant",
        "concat_quant",
        "conv1d_quant",
        "conv1d_ulqw",
        "conv3d_quant",
        "conv3d_ulqw",
        "deconv_24_quant",
        "deconv_filter",
        "deconv_quant",
        "deconv_ulqw",
        "deconv_ulqw_cwfalse",
        "encoder_24_quant",
        "encoder_filter",
        "encoder_quant",
        "group_24_quant",
        "group_filter_asc",
        "group_filter_noasc",
        "group_quant",
        "gru_cwfalse",
        "gru_quant",
        "lstm_quant",
        "lstm_ulqw",
        "mlp_24",
        "mlp_filter_asc",
        "mlp_filter_quant",
        "mlp_quant",
        "mlp_ulqw_w4",
        "mobile_24_quant",
        "mobile_filter_asc",
        "mobile_filter_noasc",
        "mobile_quant",
        "odd_24_quant",
        "odd_filter_quant",
        "odd_quant",
        "res_24_quant",
        "res_filter_asc",
        "res_filter_noasc",
        "res_filter_quant",
        "res_quant",
        "reused_24",
        "reused_filter",
        "reused_quant",
        "shared_24_quant",
        "shared_override",
        "shared_quant",
        "shared_quant_bn2",
        "shared_rev_clip",
        "shared_rev_pool_quant",
        "shared_rev_quant",
    ]


def moved(value: Any, device: torch.device) -> Any:
    """The tensors of nested tuples, lists and dictionaries on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if isinstance(value, tuple | list) else value


class Case:
    """The stored data of one case and the results of our run on it, each stage computed once.

    The run is on `device`; results are on the CPU, as the stored ones are.
    """

    def __init__(self, golden: Path, name: str, folder: Path, device: torch.device = torch.device("cpu")) -> None:
        self.golden, self.name, self.folder, self.device = golden, name, folder, device
        self.load = load_module(golden / "load.py")
        self.models = load_module(golden / "models.py")
        self.facts: dict[str, Any] = self.load.facts(name)
        self.data = moved(self.load.data(name), device)
        self.config = str(golden / name / "compress.cfg")
        self.record = str(folder / "record.txt")
        quirks = json.loads((golden / "quirks.json").read_text())
        self.unbound: dict[str, str] = quirks.get(name, {})
        self.notes: list[tuple[str, str]] = []  # of the test that is running

    def deviates(self, why: str) -> None:
        """Note that the running test asserts a documented deviation (for the summary)."""
        self.notes.append(("deviation", why))

    def float_model(self) -> nn.Module:
        model, _ = self.models.build(self.facts["model"])
        model.load_state_dict(self.load.float_state(self.name))
        return model.to(self.device).eval()

    def state(self, model: nn.Module) -> OrderedDict[str, Tensor]:
        """Under AMCT's names."""
        return OrderedDict((key, value.cpu()) for key, value in amct_ext.to_amct_state_dict(model).items())

    @functools.cached_property
    def golden_results(self) -> dict[str, Any]:
        return self.load.results(self.name) if self.stored("results.pt") else {}

    def stored(self, file: str) -> bool:
        """Whether AMCT got far enough to leave this file."""
        return (self.golden / self.name / file).is_file()

    @functools.cached_property
    def created(self) -> nn.Module:
        with torch.random.fork_rng():
            model = amct_ext.create_compressed_retrain_model(
                self.float_model(), self.data["sample_x"], self.config, self.record
            )
        self.record_after_create = Path(self.record).read_text()
        self.created_state = self.state(model)
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.facts["lr"], momentum=self.facts["momentum"])

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(*self.data["train_x"][i]), self.data["train_y"][i])
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    @functools.cached_property
    def trained(self) -> nn.Module:
        """The model after the training steps; fills losses, per_step (AMCT's names) and first_grads (our names)."""
        model = self.created
        self.losses: list[float] = []
        self.per_step: list[OrderedDict[str, Tensor]] = []
        model.train()
        if "mid_eval_out" in self.golden_results:  # two steps and an evaluation come first
            optimizer = self.optimizer(model)
            for i in range(2):
                self.step(model, optimizer, i)
            self.mid_eval = self.evaluate(model)
            model.train()
        if "eval_before_train" in self.golden_results:
            self.evaluate(model)
            model.train()
        optimizer = self.optimizer(model)
        for i in range(self.facts["steps"]):
            self.losses.append(self.step(model, optimizer, i))
            self.per_step.append(self.state(model))
            if i == 0:
                self.first_grads = {
                    n: None if p.grad is None else p.grad.cpu().clone() for n, p in model.named_parameters()
                }
        self.checkpoint = str(self.folder / "checkpoint.pth")
        torch.save({"state_dict": model.state_dict()}, self.checkpoint)
        self.record_after_train = Path(self.record).read_text()
        return model

    def evaluate(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(*self.data["eval_x"]).cpu()

    @functools.cached_property
    def eval_out(self) -> Tensor:
        out = self.evaluate(self.trained)
        self.record_after_eval = Path(self.record).read_text()
        return out

    def restore(self, record: str, checkpoint: str, name: str | None = "state_dict") -> nn.Module:
        return amct_ext.restore_compressed_retrain_model(
            self.float_model(), self.data["sample_x"], self.config, record, checkpoint, name
        )

    @functools.cached_property
    def amct_restored(self) -> nn.Module:
        """Our restore from AMCT's own checkpoint and record."""
        record = self.folder / "reference_record.txt"
        record.write_text(self.load.record(self.name, "after_train"))
        return self.restore(str(record), str(self.golden / self.name / "checkpoint.pth"))
