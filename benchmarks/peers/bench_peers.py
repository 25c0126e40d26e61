"""One training step and one evaluation beside other toolkits: torch.ao, torchao, brevitas and NNCF.

    python -m benchmarks.peers.bench_peers [--models ResNet-50 BERT-small] [--threads 2] [--rounds 6] [--write]

All models of a network quantise its convolutions and linear layers (`toolkits.py` says how) and take turns; a step is
forward, backward and SGD. Printed: medians, medians of the rounds' ratios to the float model, how many tensors are
quantised (weights included), what the graph holds for backward. A peer that is not installed is named and left out,
one that fails is listed with its error. ``--compile`` adds compiled models (minutes each); ``--clock cpu`` counts the
process's own time: for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import amct_ext as amct
from benchmarks.document import write_part
from benchmarks.integer.bench_integer import CLOCKS, time_in_rounds
from benchmarks.peers.toolkits import COMPILED, LAYERS, PEERS, Peer, quantizers, torchao_linear
from benchmarks.step.models import JOBS, Job
from benchmarks.step.variants import FLOAT, bytes_kept, make, stepper
from benchmarks.timing import processor

BEGIN, END = "<!-- peers: begin (written by benchmarks/peers/bench_peers.py) -->", "<!-- peers: end -->"
OURS = ("INT8", "INT8, forward auto")
HEADINGS = ("", "quantisers", "step ms", "to float", "evaluation ms", "to float", "kept MiB", "to float")


@dataclass
class Entry:
    """A model that takes part, what makes it ready for its turn, and its training step."""

    model: nn.Module
    ready: Callable[[], None]
    step: Callable[[], None]
    quantizers: int
    kept: float = 0.0


def _run(model: nn.Module, x: Tensor, labels: Tensor, count: int, peer: Peer | None = None) -> Entry:
    model.train()

    def ready() -> None:
        if peer is not None:
            peer.ready(model)

    entry = Entry(model, ready, stepper(model, x, labels), count)
    entry.step()  # searches or observes the ranges
    ready()
    entry.kept = bytes_kept(model, x) / 2**20
    return entry


def entries(job: Job, x: Tensor, labels: Tensor, compiled: bool) -> tuple[dict[str, Entry], dict[str, str]]:
    """The models that work, and what those said that do not."""
    found: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    for name in (FLOAT, *OURS):
        model = make(name, job, x[:1])
        found[name] = _run(model, x, labels, 2 * len(amct.forward_choices(model)) if name != FLOAT else 0)
    if compiled:
        for name in (FLOAT, OURS[0]):
            found[f"compiled: {name}"] = _run(make(name, job, x[:1], True), x, labels, found[name].quantizers)
    built: dict[object, nn.Module] = {}
    kinds = {type(module) for module in found[FLOAT].model.modules()}
    for name, peer in {**PEERS, **(COMPILED if compiled else {})}.items():
        if peer.version() is None or (peer.build is torchao_linear and kinds & set(LAYERS) != {nn.Linear}):
            continue
        try:
            model = built.get(peer.build) or built.setdefault(peer.build, peer.build(job.model(), x))
            found[name] = _run(model, x, labels, quantizers(model), peer)
        except Exception as error:  # whatever another toolkit raises is a result here
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return found, failed


def measure(found: dict[str, Entry], x: Tensor, args: argparse.Namespace) -> list[list[str]]:
    def ready(name: str) -> None:
        found[name].ready()

    def evaluation(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(x)

        return run

    clock = CLOCKS[args.clock]
    steps = time_in_rounds({name: entry.step for name, entry in found.items()}, args.rounds, clock, 1, ready)
    for entry in found.values():
        entry.model.eval()
    evaluations = time_in_rounds(
        {name: evaluation(entry.model) for name, entry in found.items()}, args.rounds, clock, 1, ready
    )
    rows = []
    for name, entry in found.items():
        row = [name, str(entry.quantizers)]
        for times in (steps, evaluations):
            ratio = statistics.median(own / base for own, base in zip(times[name], times[FLOAT], strict=True))
            row += [f"{statistics.median(times[name]):.0f}", f"{ratio:.2f}x"]
        rows.append([*row, f"{entry.kept:.0f}", f"{entry.kept / found[FLOAT].kept:.2f}x"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(JOBS), default=["small ResNet", "ResNet-50"])
    parser.add_argument("--batch", type=int, help="samples (default: 8, 32 for the small ResNet)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="compiled models, too")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--write", action="store_true", help="replace this part of docs/performance.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # deprecations in other toolkits
    started = time.perf_counter()

    versions = {peer.package: peer.version() for peer in PEERS.values()}
    how = f"threads: {args.threads}, medians of {args.rounds} rounds, {args.clock} time"
    present = ", ".join(f"{package} {found}" for package, found in versions.items() if found)
    lines = [f"{date.today()}, {processor()}, {how}. {present}."]
    lines += [f"Not installed, left out: {package}." for package, found in versions.items() if not found]
    table = Table(*HEADINGS, title="\n".join(lines))
    for name in args.models:
        torch.manual_seed(0)
        x, labels = JOBS[name].batch(args.batch or JOBS[name].samples)
        found, failed = entries(JOBS[name], x, labels, args.compile)
        print(f"{name}: {len(found)} models ready after {time.perf_counter() - started:.0f} s", flush=True)
        rows = measure(found, x, args)
        rows += [[variant, f"failed: {error}"] for variant, error in failed.items()]
        title = f"{name}, batch {len(x)}"
        table.add_row(f"[bold]{title}[/bold]")
        for row in rows:
            table.add_row(*row)
        table.add_section()
        lines += ["", f"**{title}**", "", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
        lines += ["| " + " | ".join(row) + " |" for row in rows if len(row) == len(HEADINGS)]
        lines += ["", *(f"{variant} failed: `{error}`  " for variant, error in failed.items())] if failed else []
    Console(width=150).print(table)
    print(f"{time.perf_counter() - started:.0f} s")
    if args.write:
        write_part(BEGIN, END, lines)


if __name__ == "__main__":
    main()
