"""A quick check of the accuracy (at most three minutes): one seed, small tasks, amct_ext beside the float network.

    python -m benchmarks.accuracy.quick

Prints a Markdown table. Fails on an exception, and on a score that is plainly broken: one that lost more than half of
what the float network is ahead of chance, three quarters where half of the channels are gone. It needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.run import CACHE, run
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import SETTINGS, Setting, load_task


@dataclass(frozen=True)
class Check:
    """``chance``: the score of a network that knows nothing; ``max_loss``: share of the float network's lead on it."""

    task: str
    setting: str
    chance: float
    max_loss: float = 0.5


CHECKS = (
    Check("digits", "int8", 10.0),
    Check("digits", "half", 10.0, 0.75),
    Check("lm-small", "int8", math.log2(96)),
    Check("lm-small", "int4", math.log2(96)),
    Check("lm-small", "sparse", math.log2(96)),
)
_METHODS = ("amct", "amct-best")


def is_broken(check: Check, score: float, floating: float) -> bool:
    """Whether too much of the float network's lead on chance is gone; NaN counts as broken."""
    lead = (score - check.chance) / (floating - check.chance)
    return not lead >= 1 - check.max_loss


def score_of(task: Task, setting: Setting, method: str) -> float:
    score = run(task, setting, METHODS[method], seed=0).score
    return math.nan if score is None else score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"data and float weights (default: {CACHE})")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, failures = time.perf_counter(), []
    floating: dict[str, float] = {}
    print("| task | setting | float + budget | " + " | ".join(METHODS[name].label for name in _METHODS) + " |")
    print("|---" * (3 + len(_METHODS)) + "|")
    for check in CHECKS:
        task, setting = load_task(check.task, args.cache), SETTINGS[check.setting]
        if check.task not in floating:
            floating[check.task] = score_of(task, SETTINGS["float"], "float-budget")
        base = floating[check.task]
        scores = [score_of(task, setting, name) for name in _METHODS]
        cells = [f"{score:.{task.decimals}f}" for score in (base, *scores)]
        print(f"| {check.task} | {setting.about} | {' | '.join(cells)} |", flush=True)
        for name, score in zip(_METHODS, scores, strict=True):
            if is_broken(check, score, base):
                failures.append(f"{check.task}, {setting.about}, {METHODS[name].label}: {score} where float has {base}")
    print(f"\n{time.perf_counter() - began:.0f} s", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
