"""One whole training step: float against ours in every form, against the same in eager torch and in torch's own ops.

    python -m benchmarks.step.bench_retrain_step [--models ResNet-50 BERT-small] [--threads 2] [--rounds 6] [--quick]

Each variant takes turns with the float model in one process, so a busy moment of the machine hits both. Printed,
network by network: medians, medians of the ratios to the float model's, the first step (which searches the clip
ranges), what the graph holds for backward, peak memory of a process of its own, and the time of create, restore,
record and save. ``--quick``: two rounds, no peak memory, no times of create to save. ``--write`` puts the tables into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import torch
from rich.console import Console
from rich.table import Table

from amct_ext import build_info
from benchmarks.document import write_part
from benchmarks.step import flow_functions, memory
from benchmarks.step.models import JOBS, Job
from benchmarks.step.variants import EAGER, FLOAT, VARIANTS, bytes_kept, make, stepper
from benchmarks.timing import processor

BEGIN, END = "<!-- step: begin (written by benchmarks/step/bench_retrain_step.py) -->", "<!-- step: end -->"
HEADINGS = ("", "step ms", "to float", "to eager INT8", "first ms", "kept MiB", "to float", "peak MiB", "to float")


@dataclass
class Figures:
    """Of one variant of one network; milliseconds and MiB."""

    step: float = 0.0
    ratio: float = 0.0  # median of the rounds' ratios to the float model
    eager: float = 0.0
    first: float = 0.0
    kept: float = 0.0
    peak: float | None = None


def milliseconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def measure(job: Job, args: argparse.Namespace) -> dict[str, Figures]:
    """Each variant in turns with the float model: two models at a time are in memory."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    x, labels = (value.to(device) for value in job.batch(args.batch or job.samples))
    base, times = Figures(ratio=1.0), []
    base_model = make(FLOAT, job, x[:1].cpu(), args.compile).to(device)
    base_step = stepper(base_model, x, labels)
    base.first, base.kept = milliseconds(base_step), bytes_kept(base_model, x) / 2**20
    found = {FLOAT: base}
    for variant in args.variants:
        model = make(variant, job, x[:1].cpu(), args.compile).to(device)
        step = stepper(model, x, labels)
        figures = found[variant] = Figures(first=milliseconds(step), kept=bytes_kept(model, x) / 2**20)
        pairs = [(milliseconds(base_step), milliseconds(step)) for _ in range(args.rounds + 1)][
            1:
        ]  # the first warms up
        times += [of_base for of_base, _ in pairs]
        figures.step = statistics.median(own for _, own in pairs)
        figures.ratio = statistics.median(own / of_base for of_base, own in pairs)
    base.step = statistics.median(times)
    for figures in found.values():
        figures.eager = figures.ratio / found[EAGER].ratio if EAGER in found else float("nan")
    return found


def peaks(name: str, found: dict[str, Figures], args: argparse.Namespace) -> None:
    samples = args.batch or JOBS[name].samples
    for v, figures in found.items():
        if args.device == "cpu":
            figures.peak = memory.peak_resident(name, v, samples, args.threads)
        else:
            figures.peak = memory.peak_cuda(name, v, samples)


def cells(variant: str, figures: Figures, base: Figures) -> list[str]:
    peak = ["", ""]
    if figures.peak is not None and base.peak is not None:
        peak = [f"{figures.peak:.0f}", f"{figures.peak / base.peak:.2f}x"]
    return [
        variant,
        f"{figures.step:.0f}",
        f"{figures.ratio:.3f}x",
        f"{figures.eager:.2f}x",
        f"{figures.first:.0f}",
        f"{figures.kept:.0f}",
        f"{figures.kept / base.kept:.2f}x",
        *peak,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(JOBS), default=[name for name in JOBS if name[0].isupper()])
    others = [variant for variant in VARIANTS if variant != FLOAT]
    parser.add_argument("--variants", nargs="+", choices=others, default=others, help="default: all")
    parser.add_argument("--batch", type=int, help="samples (default: 8, 32 for the small ResNet)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="every model through torch.compile")
    parser.add_argument("--quick", action="store_true", help="two rounds, no peak memory, no times of the flow")
    parser.add_argument("--write", action="store_true", help="replace this part of docs/performance.md")
    args = parser.parse_args()
    args.rounds = 2 if args.quick else args.rounds
    torch.set_num_threads(args.threads)

    if args.write and args.variants != others:
        parser.error("--write takes all variants")
    how = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    how += ", compiled" if args.compile else ""
    if args.device == "cpu":
        how += f", instruction set {build_info()['simd']}"
    lines = [f"{date.today()}, {processor()}, torch {torch.__version__}, {how}; medians of {args.rounds} rounds."]
    for name in args.models:
        found = measure(JOBS[name], args)
        if not args.quick:
            peaks(name, found, args)
        title = f"{name}, batch {args.batch or JOBS[name].samples}"
        if not args.quick:
            taken = flow_functions.times(JOBS[name])
            title += ", 2:4 + INT8: " + ", ".join(f"{name} {taken[name]:.1f} s" for name in flow_functions.NAMES)
        table = Table(title=f"{title}; {lines[0]}")
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading else "left")
        rows = [cells(v, figures, found[FLOAT]) for v, figures in found.items()]
        for row in rows:
            table.add_row(*row)
        Console(width=130).print(table)
        lines += ["", f"**{title}**", "", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    if args.write:
        write_part(BEGIN, END, lines)


if __name__ == "__main__":
    main()
