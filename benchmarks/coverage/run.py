"""Measures models of the list, each in a process of its own with limits of time and memory.

    python -m benchmarks.coverage.run                                     # all that have no result yet
    python -m benchmarks.coverage.run --models timm/resnet18 'smp/*' --again
    python -m benchmarks.coverage.run --parts prune rival --results /tmp/prune.jsonl

Appends a JSON line per model, so that an interrupted run goes on where it stopped. A model takes 10 to 60 seconds on
one core.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.coverage.measure import PARTS
from benchmarks.coverage.results import RESULTS, Result, append, from_line, read
from benchmarks.version import commit
from benchmarks.coverage.zoo.registry import ENTRIES

SECONDS, GIGABYTES = 300.0, 12.0


def run_one(name: str, parts: Sequence[str], seconds: float, gigabytes: float) -> Result:
    """Of a process that is killed at the limits; what it says at its end becomes the error where it gives no result."""
    limit = int(gigabytes * 2**30)
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.coverage.measure", name, "--parts", *parts],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return Result(name, error=f"not done within {seconds:g} s")
    try:
        return from_line(out.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (err.strip().splitlines() or ["no message"])[-1]
        return Result(name, error=f"the process ended with {child.returncode}: {last[:200]}")


def chosen(patterns: Sequence[str]) -> list[str]:
    """Names that match one of the patterns; all without a pattern."""
    return [name for name in ENTRIES if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def summary(result: Result) -> str:
    parts = [result.model]
    if result.error:
        parts.append(result.error)
    for label, part in (("amct_ext", result.ours), ("Torch-Pruning", result.rival)):
        if part is not None:
            done = f"{part.pruned} of {result.asked}, {part.parameters_left:.2f} / {part.macs_left:.2f} left"
            parts.append(f"{label}: {part.error or done}")
    if result.quantised is not None:
        job = result.quantised
        parts.append(f"{job.stage}: {job.error}" if job.error else f"INT8 {job.weights:.3f}, ONNX {job.onnx}")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="names or patterns (default: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--again", action="store_true", help="also models that have a result")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="limit of one process")
    args = parser.parse_args()
    found = {} if args.again else read(args.results)
    for name in chosen(args.models):
        if name not in found:
            result = replace(run_one(name, args.parts, args.seconds, args.gigabytes), version=commit())
            append(result, args.results)
            print(summary(result), flush=True)


if __name__ == "__main__":
    main()
