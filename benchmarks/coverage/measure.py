"""All figures of one model."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.coverage import amct_ext_pruner, quantised, torch_pruning_pruner
from benchmarks.coverage.amct_ext_pruner import describe
from benchmarks.coverage.layers import find_layers, macs, parameters
from benchmarks.coverage.randomize_norms import randomize_norms
from benchmarks.coverage.results import DEFAULT_PARTS, Pruned, Quantised, Result
from benchmarks.coverage.zoo.entry import Entry

RATIO = 0.3
SECONDS = 180.0  # for a part


def measure(
    entry: Entry, parts: Sequence[str] = DEFAULT_PARTS, ratio: float = RATIO, seconds: float = SECONDS
) -> Result:
    """Weights and inputs are drawn with seed 0. A part that fails or takes longer has that as its error."""
    torch.manual_seed(0)
    try:
        model, inputs = entry.build(), entry.inputs()
        randomize_norms(model, inputs)
        layers, products = find_layers(model, inputs), macs(model, inputs)
    except Exception as error:
        return Result(entry.name, error=describe(error))
    result = Result(entry.name, asked=layers.asked(ratio), parameters=parameters(model), macs=products)
    steps: dict[str, tuple[Callable[[], Any], Callable[[str], Any]]] = {
        "ours": (
            lambda: amct_ext_pruner.prune(model, inputs, layers, products, ratio),
            lambda text: Pruned(error=text),
        ),
        "peer": (
            lambda: torch_pruning_pruner.prune(model, inputs, layers, products, ratio),
            lambda text: Pruned(error=text),
        ),
        "quantised": (
            lambda: quantised.job(model, inputs, layers, ratio),
            lambda text: Quantised(error=text),
        ),
        "best": (
            lambda: quantised.job(model, inputs, layers, ratio, "BEST"),
            lambda text: Quantised(error=text),
        ),
    }
    found: dict[str, Any] = {}
    for name in parts:
        step, failed = steps[name]
        try:
            with time_limit(seconds):
                found[name] = step()
        except (Exception, TookTooLongError) as error:
            found[name] = failed(describe(error).removeprefix("TookTooLongError: "))
    return replace(result, **found)


class TookTooLongError(BaseException):
    """The limit of a part has passed. No Exception, so that no handler in what is measured takes it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TookTooLongError in the main thread once the seconds have passed."""

    def stop(*_: object) -> None:
        raise TookTooLongError(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_process() -> None:
    """One thread, no downloads, no warnings of other packages."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
