"""One run: compress, train for the task's budget, score. Prints a JSON line and appends it to the results.

    python -m benchmarks.accuracy.run lm int4 amct-best --seed 0
    python -m benchmarks.accuracy.run vad int8 brevitas --no-write

A run takes 10 to 90 seconds on one thread, the first of a task minutes more for data and float weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.accuracy.material.packages import MissingMaterial
from benchmarks.accuracy.methods import METHODS, Method
from benchmarks.accuracy.results import Result, append
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import SETTINGS, TASKS, Setting, load_task
from benchmarks.accuracy.trainee import NotOffered
from benchmarks.accuracy.training import train

CACHE = Path.home() / ".cache" / "amct_ext" / "accuracy"


def run(task: Task, setting: Setting, method: Method, seed: int) -> Result:
    """Raises NotOffered where the method has no such setting."""
    model = task.start(seed)
    began = time.perf_counter()
    trainee = method.prepare(model, task, setting)
    ready = time.perf_counter()
    if trainee.trained:
        train(trainee.model, task, task.budget, seed, trainee.groups, trainee.loss_of, trainee.before_step)
    done = time.perf_counter()
    return Result(
        task.name,
        setting.name,
        method.name,
        seed,
        score=round(task.evaluate(trainee.model), 4),
        prepare_seconds=round(ready - began, 1),
        train_seconds=round(done - ready, 1),
        version=method.installed() or "",
    )


def attempt(task_name: str, setting: Setting, method: Method, seed: int, cache: Path) -> Result:
    """The result, or a skipped one with its reason where something is not installed or not offered."""
    if method.installed() is None:
        return Result(task_name, setting.name, method.name, seed, skipped=f"{method.package} is not installed")
    try:
        return run(load_task(task_name, cache), setting, method, seed)
    except (NotOffered, MissingMaterial) as error:
        return Result(task_name, setting.name, method.name, seed, skipped=str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"data and float weights (default: {CACHE})")
    parser.add_argument("--no-write", action="store_true", help="print the result only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # deprecations in other toolkits
    with contextlib.redirect_stdout(sys.stderr):  # what toolkits print
        result = attempt(args.task, SETTINGS[args.setting], METHODS[args.method], args.seed, args.cache)
    print(json.dumps(asdict(result)))
    if not args.no_write:
        append(result)


if __name__ == "__main__":
    main()
