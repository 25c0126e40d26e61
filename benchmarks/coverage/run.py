"""Measures models of the list, each in a process of its own with limits of time and memory.

    python -m benchmarks.coverage.run                                     # all parts that have no result yet
    python -m benchmarks.coverage.run --models timm/resnet18 'smp/*' --again
    python -m benchmarks.coverage.run --parts ours peer --results out/pruning.jsonl

Appends a JSON line per model, so that an interrupted run goes on where it stopped. A model takes 5 to 60 seconds on one
core.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import importlib.util
import multiprocessing
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.coverage.measure import SECONDS, limit_process, measure
from benchmarks.coverage.results import DEFAULT_PARTS, PARTS, RESULTS, Result, append, read
from benchmarks.coverage.zoo.registry import ENTRIES
from benchmarks.version import commit

GIGABYTES = 12.0
_SPARE_SECONDS = 60.0  # beyond the limits of the parts: building the model, and code that hears no signal


def run_one(name: str, parts: Sequence[str], seconds: float, gigabytes: float, log: Path) -> Result:
    """Of a forked process, which is killed at the limits; what it prints is appended to the log."""
    context = multiprocessing.get_context("fork")  # packages that are imported already need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(name, parts, seconds, gigabytes, log, sender))
    child.start()
    sender.close()
    result = None
    in_time = receiver.poll(seconds * len(parts) + _SPARE_SECONDS)
    with contextlib.suppress(EOFError):
        result = receiver.recv() if in_time else None
    if not in_time:
        child.kill()
    child.join()
    if result is None:
        result = Result(name, error=f"the process ended with {child.exitcode}" if in_time else "not done in time")
    return result


def _measure(name: str, parts: Sequence[str], seconds: float, gigabytes: float, log: Path, sender: Connection) -> None:
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        print(f"==== {name}", file=sys.stderr, flush=True)
        sender.send(measure(ENTRIES[name], parts, seconds=seconds))
        sys.stdout.flush()


def preload(names: Sequence[str], parts: Sequence[str]) -> None:
    """Imports what the models need, those packages that are there."""
    packages = dict.fromkeys(ENTRIES[name].package for name in names)
    more = {"peer": "torch_pruning", "quantised": "onnxruntime", "best": "onnxruntime"}
    for package in (*packages, *(more[part] for part in parts if part in more)):
        with contextlib.suppress(ImportError):
            importlib.import_module(package)


def chosen(patterns: Sequence[str]) -> list[str]:
    """Names that match one of the patterns, in the order of these; all without a pattern."""
    return list(dict.fromkeys(name for pattern in patterns or ["*"] for name in fnmatch.filter(ENTRIES, pattern)))


def is_installed(name: str) -> bool:
    """Whether the package of a model is there; without it there is nothing to measure."""
    return importlib.util.find_spec(ENTRIES[name].package) is not None


def missing_parts(found: Result | None, parts: Sequence[str]) -> list[str]:
    """What a result does not have of the parts; nothing where the model itself fails."""
    if found is None:
        return list(parts)
    return [] if found.error else [part for part in parts if getattr(found, part) is None]


def summary(result: Result) -> str:
    parts = [result.model]
    if result.error:
        parts.append(result.error)
    for label, part in (("amct_ext", result.ours), ("Torch-Pruning", result.peer)):
        if part is not None:
            done = f"{part.pruned} of {result.asked}, {part.parameters_left:.2f} / {part.macs_left:.2f} left"
            parts.append(f"{label}: {part.error or done}")
    for job in filter(None, (result.quantised, result.best)):
        figures = f"INT8 {job.weights}, restored {job.equal}, ONNX {job.onnx} ({job.noise})"
        parts.append(f"{job.stage}: {job.error}" if job.error else figures)
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="names or patterns (default: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS)
    parser.add_argument("--again", action="store_true", help="also models that have a result")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for one part of a model")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="limit of one process")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="what the processes print, with tracebacks")
    args = parser.parse_args()
    found = {} if args.again else read(args.results)
    missing = {name: missing_parts(found.get(name), args.parts) for name in chosen(args.models)}
    missing = {name: parts for name, parts in missing.items() if parts}
    for name in [name for name in missing if not is_installed(name)]:
        print(f"{name}: skipped, {ENTRIES[name].package} is not installed", flush=True)
        del missing[name]
    limit_process()
    preload(list(missing), args.parts)
    for name, parts in missing.items():
        result = replace(run_one(name, parts, args.seconds, args.gigabytes, args.log), version=commit())
        append(result, args.results)
        print(summary(result), flush=True)


if __name__ == "__main__":
    main()
