"""The ways of a product: whole training steps and evaluations, models taking turns in one process.

    python -m benchmarks.integer.bench_integer [--threads 2] [--rounds 7] [--models ResNet-50 BERT-small] [--clock cpu]
        [--parts evaluation]

Printed: medians, and the medians of the rounds' ratios to the float model (images: to the faster of its two memory
layouts), and how many layers of an evaluation took which way. ``--clock cpu`` counts the process's own time instead of
the wall's: for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import amct_ext as amct
from benchmarks.step.models import JOBS, Job
from benchmarks.step.variants import FLOAT, make, stepper

LAST = "channels last"
Run = Callable[[], object]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def channels_last(x: Any) -> Any:
    return x.to(memory_format=torch.channels_last)


def models(job: Job, x: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Each model and the batch in its layout; the float ones come first."""
    pictures = x.dim() == 4
    result = {FLOAT: (make(FLOAT, job, x[:1]), x)}
    if pictures:
        result[f"{FLOAT}, {LAST}"] = channels_last(make(FLOAT, job, x[:1])), channels_last(x)
    for forward in ("float", "auto", "integer", "prepared"):
        model = make("INT8", job, x[:1])
        amct.configure(model, forward=forward)
        result[f"INT8, {forward}"] = model, x
    if pictures:
        model = channels_last(make("INT8", job, x[:1]))
        amct.configure(model, forward="auto")
        result[f"INT8, auto, {LAST}"] = model, channels_last(x)
    return result


def training(model: nn.Module, x: Tensor, labels: Tensor) -> Run:
    step = stepper(model, x, labels)

    def run() -> None:
        model.train()
        step()

    return run


def evaluation(model: nn.Module, x: Tensor) -> Run:
    model.train()
    with torch.no_grad():
        model(x)  # calibrates

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    return run


def time_in_rounds(
    runs: dict[str, Run],
    rounds: int,
    clock: Callable[[], float],
    warm_up: int = 2,  # rounds, in which models also calibrate and choose
    ready: Callable[[str], None] = lambda name: None,  # before each run, not counted
) -> dict[str, list[float]]:
    """Milliseconds of every run in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + rounds):
        for name, run in runs.items():
            ready(name)
            started = clock()
            run()
            if turn >= warm_up:
                times[name].append((clock() - started) * 1e3)
    return times


def columns(times: dict[str, list[float]]) -> dict[str, tuple[str, str]]:
    """Median, and median ratio to the float model whose median is the smaller."""
    floats = min((name for name in times if name.startswith(FLOAT)), key=lambda name: statistics.median(times[name]))
    return {
        name: (
            f"{statistics.median(values):.0f}",
            f"{statistics.median(a / b for a, b in zip(values, times[floats], strict=True)):.2f}x",
        )
        for name, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="default: the model's own")
    parser.add_argument("--models", nargs="+", choices=JOBS, default=["ResNet-50", "MobileNetV2", "BERT-small"])
    parser.add_argument("--only", nargs="+", help="variants, by the names of the table")
    parser.add_argument("--parts", nargs="+", choices=("step", "evaluation"), default=["step", "evaluation"])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        job = JOBS[name]
        torch.manual_seed(0)
        x, labels = job.batch(args.batch or job.samples)
        made = {key: pair for key, pair in models(job, x).items() if not args.only or key in args.only}
        clock = CLOCKS[args.clock]
        measured = {"step": training, "evaluation": lambda model, batch, _: evaluation(model, batch)}
        parts = {
            part: columns(
                time_in_rounds(
                    {key: measured[part](model, batch, labels) for key, (model, batch) in made.items()},
                    args.rounds,
                    clock,
                )
            )
            for part in args.parts
        }
        kernel = amct.build_info()["integer_product"]
        table = Table(title=f"{name}, batch {x.shape[0]}, {args.threads} threads, {kernel}, median ms ({args.clock})")
        for heading in ("", *(text for part in parts for text in (part, "to float")), "integer", "prepared"):
            table.add_column(heading, justify="right" if heading else "left")
        for key, (model, _) in made.items():
            chosen = [] if key.startswith(FLOAT) else list(amct.forward_choices(model).values())
            counts = [f"{chosen.count(way)} of {len(chosen)}" if chosen else "" for way in ("integer", "prepared")]
            table.add_row(key, *(cell for part in parts.values() for cell in part[key]), *counts)
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
