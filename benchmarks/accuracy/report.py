"""The tables of docs/accuracy.md, out of the raw results; runs what is missing when asked to.

    python -m benchmarks.accuracy.report                              # tables of the results that are there
    python -m benchmarks.accuracy.report --run --tasks lm --methods amct amct-best --seeds 0 1 2
    python -m benchmarks.accuracy.report --write                      # into docs/accuracy.md

Runs go one by one, each method in a process of its own (some toolkits replace functions of torch), and each appends
its result, so that an interrupted report goes on where it stopped; ``--again`` repeats runs that have one.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.results import Result, read
from benchmarks.accuracy.run import CACHE
from benchmarks.accuracy.tables import accuracy_table, comparison_table, costs_table, options_table, skipped_list
from benchmarks.accuracy.tasks.registry import MEASURED
from benchmarks.document import show_parts

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"
_PARTS = {
    "accuracy": accuracy_table,
    "comparison": comparison_table,
    "skipped": skipped_list,
    "options": options_table,
    "costs": costs_table,
}


def planned_runs(tasks: Iterable[str], methods: Iterable[str]) -> list[tuple[str, str, str]]:
    """(task, setting, method); float networks are run once for a task, not for each setting."""
    runs: dict[tuple[str, str, str], None] = {}
    for task, name in itertools.product(tasks, methods):
        settings = ("float",) if METHODS[name].kind == "float" else MEASURED[task]
        runs |= {(task, setting, name): None for setting in settings}
    return list(runs)


def run_missing(args: argparse.Namespace) -> None:
    """Failed runs are named and left out; the others go on."""
    found = {} if args.again else read()
    for task, setting, method in planned_runs(args.tasks, args.methods):
        seeds = [str(seed) for seed in args.seeds if (task, setting, method, seed) not in found]
        if not seeds:
            continue
        command = [sys.executable, "-m", "benchmarks.accuracy.run", task, setting, method, "--seeds", *seeds]
        done = subprocess.run([*command, "--cache", str(args.cache)], capture_output=True, text=True)
        print(done.stdout.strip(), flush=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"failed: {task} {setting} {method}: {last}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run what has no result yet")
    parser.add_argument("--again", action="store_true", help="with --run: run what has a result, too")
    parser.add_argument("--tasks", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"data and float weights (default: {CACHE})")
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/accuracy.md")
    args = parser.parse_args()
    if args.run:
        run_missing(args)
    results: list[Result] = list(read().values())
    show_parts(DOCUMENT, _PARTS, results, "benchmarks/accuracy/report.py", args.write)


if __name__ == "__main__":
    main()
