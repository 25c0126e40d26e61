"""One model, measured in this process; prints its result as a JSON line.

    python -m benchmarks.coverage.measure timm/resnet18
    python -m benchmarks.coverage.measure timm/resnet18 --parts prune
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from benchmarks.coverage import ours, rival
from benchmarks.coverage.layers import find_layers, macs, parameters
from benchmarks.coverage.ours import describe
from benchmarks.coverage.results import Pruned, Result, to_line
from benchmarks.coverage.settle import settle
from benchmarks.coverage.zoo.entry import Entry
from benchmarks.coverage.zoo.registry import ENTRIES

RATIO = 0.3
PARTS = ("prune", "rival", "quantise")


def measure(entry: Entry, parts: Sequence[str] = PARTS, ratio: float = RATIO) -> Result:
    """Weights and inputs are drawn with seed 0."""
    if importlib.util.find_spec(entry.package) is None:
        return Result(entry.name, error=f"{entry.package} is not installed")
    torch.manual_seed(0)
    try:
        model, inputs = entry.build(), entry.inputs()
        settle(model, inputs)
        layers, operations = find_layers(model, inputs), macs(model, inputs)
    except Exception as error:
        return Result(entry.name, error=describe(error))
    pruned = compared = None
    if "prune" in parts:
        pruned = ours.prune(model, inputs, layers, operations[""], ratio)
    if "rival" in parts:
        missing = importlib.util.find_spec("torch_pruning") is None
        compared = (
            Pruned(error="torch_pruning is not installed")
            if missing
            else rival.prune(model, inputs, layers, operations[""], ratio)
        )
    return Result(
        entry.name,
        asked=layers.asked(ratio),
        parameters=parameters(model),
        macs=operations[""],
        ours=pruned,
        rival=compared,
    )


def quiet() -> None:
    """One thread, no downloads, no words of the packages."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(ENTRIES), metavar="MODEL")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    quiet()
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(ENTRIES[args.model], args.parts)
    print(to_line(result))


if __name__ == "__main__":
    main()
