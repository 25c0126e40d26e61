"""The integer forward: whole training steps and evaluations, models taking turns in one process.

    python benchmarks/bench_integer.py [--threads 2] [--rounds 7] [--models resnet50,bert-small]

Columns are medians and ratios to the float model; the float model runs in the faster of its two memory layouts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

import amct_ext as amct

INT8 = "batch_num: 1 retrain_data_quant_config { ulq_quantize { } } retrain_weight_quant_config { arq_retrain { } }"
Run = Callable[[], None]


class Logits(nn.Module):
    """A transformers model that takes one tensor and gives one."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(**{self.name: x}).logits
        return logits


def resnet50() -> nn.Module:
    config = ResNetConfig()
    config.num_labels = 10
    return Logits(ResNetForImageClassification(config), "pixel_values")


def bert_small() -> nn.Module:
    config = BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
    config.num_labels = 10
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return Logits(BertForSequenceClassification(config), "input_ids")


MODELS = {
    "resnet50": (resnet50, lambda: torch.randn(8, 3, 224, 224)),
    "bert-small": (bert_small, lambda: torch.randint(0, 30000, (8, 128))),
}


def compressed(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compress.cfg"
        path.write_text(INT8)
        return amct.create_compressed_retrain_model(make(), x[:1], str(path), str(Path(folder) / "record.txt"))


def step(model: nn.Module, x: Tensor) -> Run:
    """One step of plain SGD; the learning rate is so small that all steps do the same work."""
    labels = torch.randint(0, 10, (x.shape[0],))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return run


def evaluation(model: nn.Module, x: Tensor) -> Run:
    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    return run


def turns(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):  # two rounds warm up, calibrate and choose
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn > 1:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def channels_last(x: Any) -> Any:
    return x.to(memory_format=torch.channels_last)


def variants(name: str) -> tuple[dict[str, tuple[nn.Module, Tensor]], nn.Module]:
    make, sample = MODELS[name]
    torch.manual_seed(0)
    x = sample()
    plain = make()
    models: dict[str, tuple[nn.Module, Tensor]] = {"float32": (plain, x)}
    if x.dim() == 4:
        models["float32, channels last"] = channels_last(make()), channels_last(x)
    for forward in ("float", "auto", "integer"):
        model = compressed(make, x)
        amct.configure(model, forward=forward)
        models[f"INT8, {forward}"] = model, x
        if x.dim() == 4 and forward == "integer":
            model = channels_last(compressed(make, x))
            amct.configure(model, forward=forward)
            models["INT8, integer, channels last"] = (model, channels_last(x))
    return models, models["INT8, auto"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models.split(","):
        models, auto = variants(name)
        steps = turns({key: step(model, x) for key, (model, x) in models.items()}, args.rounds)
        evals = turns({key: evaluation(model, x) for key, (model, x) in models.items()}, args.rounds)
        table = Table(title=f"{name}, {args.threads} threads, median ms")
        for heading in ("", "step", "against float", "evaluation", "against float"):
            table.add_column(heading, justify="right" if heading else "left")
        floats = [key for key in models if key.startswith("float32")]
        best, best_eval = min(steps[key] for key in floats), min(evals[key] for key in floats)
        for key in models:
            ratios = f"{steps[key] / best:.2f}x", f"{evals[key] / best_eval:.2f}x"
            table.add_row(key, f"{steps[key]:.0f}", ratios[0], f"{evals[key]:.0f}", ratios[1])
        Console(width=120).print(table)
        chosen = list(amct.forward_choices(auto).values())
        print(f"auto took integers in {chosen.count('integer')} of {len(chosen)} layers")


if __name__ == "__main__":
    main()
