"""How calls are timed, and on which processor."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

Call = Callable[[], object]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def median_ms(call: Call, seconds: float = 0.4, least: int = 3, most: int = 200) -> float:
    """Median time of a call after two warm-up calls."""
    call()
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def interleaved(calls: Sequence[Call], seconds: float, least: int = 3, in_a_row: int = 4) -> list[list[float]]:
    """Milliseconds of every call in every round.

    Calls take turns, so a neighbour's load shows in all of them. A round is the median of a few calls in a row after
    one that brings back the caches, and the first round warms up.
    """

    def once(call: Call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    rounds: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while len(rounds[0]) <= least or time.perf_counter() < end:
        for times, call in zip(rounds, calls, strict=True):
            call()
            times.append(statistics.median(once(call) for _ in range(in_a_row)))
    return [times[1:] for times in rounds]


def median_ratio(times: Sequence[float], than: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, than, strict=True))
