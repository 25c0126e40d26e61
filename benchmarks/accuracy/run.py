"""Compress, train for the task's budget, score: one run for each seed.

    python -m benchmarks.accuracy.run lm int4 amct-best --seeds 0 1 2
    python -m benchmarks.accuracy.run vad int8 brevitas --no-write

Prints a JSON line per run and appends it to the results. A run takes 10 to 90 seconds on one thread, the first of a
task minutes more for data and float weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.accuracy.datasets.packages import MissingDataError
from benchmarks.accuracy.methods import METHODS, Method
from benchmarks.accuracy.prepared_model import UnsupportedError
from benchmarks.accuracy.results import Result, append
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import SETTINGS, TASKS, Setting, load_task
from benchmarks.accuracy.training import train
from benchmarks.version import commit

CACHE = Path.home() / ".cache" / "amct_ext" / "accuracy"


def run(task: Task, setting: Setting, method: Method, seed: int) -> Result:
    """Raises UnsupportedError where the method has no such setting."""
    model = task.float_model(seed)
    began = time.perf_counter()
    prepared = method.prepare(model, task, setting)
    ready = time.perf_counter()
    if prepared.needs_training:
        train(prepared.model, task, task.budget, seed, prepared.param_groups, prepared.loss_fn, prepared.before_step)
    done = time.perf_counter()
    return Result(
        task.name,
        setting.name,
        method.name,
        seed,
        score=round(task.evaluate(prepared.model), 4),
        prepare_seconds=round(ready - began, 1),
        train_seconds=round(done - ready, 1),
        version=(method.installed() if method.package else commit()) or "",
    )


def run_seeds(
    task_name: str, setting: Setting, method: Method, seeds: Iterable[int], cache: Path = CACHE
) -> Iterator[Result]:
    """A result for each seed, or one without a score and with the reason where something is missing or not offered.

    Float networks have one setting, "float", whatever is asked for.
    """
    if method.kind == "float":
        setting = SETTINGS["float"]
    seeds = list(seeds)
    reason = f"{method.package} is not installed"
    if method.installed() is not None:
        try:
            task = load_task(task_name, cache)
            for seed in seeds:
                yield run(task, setting, method, seed)
            return
        except (UnsupportedError, MissingDataError) as error:
            reason = str(error)
    for seed in seeds:
        yield Result(task_name, setting.name, method.name, seed, skipped=reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"data and float weights (default: {CACHE})")
    parser.add_argument("--no-write", action="store_true", help="print the result only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # deprecations in other toolkits
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what toolkits print
        for result in run_seeds(args.task, SETTINGS[args.setting], METHODS[args.method], args.seeds, args.cache):
            print(json.dumps(asdict(result)), file=out, flush=True)
            if not args.no_write:
                append(result)


if __name__ == "__main__":
    main()
