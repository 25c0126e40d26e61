"""One table of every op: ours, its baselines, the floor; writes the CPU part of docs/performance.md.

python -m benchmarks.ops.report [--quick] [--seconds S] [--no-compile] [--write]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor

import amct_ext
from amct_ext import ops
from benchmarks.document import write_part
from benchmarks.ops.bench_ops import ROWS
from benchmarks.ops.row import Row
from benchmarks.timing import interleaved, median_ratio, processor, threads

BEGIN, END = "<!-- cpu: begin (written by benchmarks/ops/report.py) -->", "<!-- cpu: end -->"
HEAD = (
    "| op | threads | floor ms | ours ms | ours/floor | aim | ours/clone | eager/ours | torch op/ours | Inductor/ours |"
)


def measure(row: Row, count: int, seconds: float, compile_too: bool) -> str:
    calls = row.calls()
    baselines = {"eager": calls.eager, "torch op": calls.torch_op, "Inductor": calls.inductor if compile_too else None}
    present = [call for call in baselines.values() if call]
    with threads(count):
        floor, ours, *fresh = interleaved([calls.floor, calls.ours, *([calls.fresh] if calls.fresh else [])], seconds)
        beside, *slower = interleaved([calls.ours, *present], seconds / 4, 2, 1)
    ratio = median_ratio(ours, floor)
    ratios = iter(f"{median_ratio(times, beside):.1f}x" for times in slower)
    cells = [
        row.name,
        str(count),
        f"{statistics.median(floor):.3f} {calls.floor_name}",
        f"{statistics.median(ours):.3f}",
        f"{ratio:.2f}",
        f"{calls.limit:.2f}{'' if ratio <= calls.limit else ' (missed)'}" if calls.limit else "",
        f"{median_ratio(ours, fresh[0]):.2f}" if fresh else "",
        *(next(ratios) if baseline else "" for baseline in baselines.values()),
    ]
    return "| " + " | ".join(cells) + " |"


def small_call_us() -> float:
    """Forward and backward of 64 elements with autograd, from Python and back, in microseconds."""
    x = torch.randn(64, requires_grad=True)
    high, low = (torch.tensor(v, requires_grad=True) for v in (2.0, -1.5))
    none, g = torch.tensor(math.nan), torch.randn(64)

    def step() -> None:
        y = ops.ulq_fake_quantize(x, high, low, none, none)[0]
        torch.autograd.grad(y, (x, high, low), g)

    for _ in range(200):
        step()
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            step()
        best = min(best, (time.perf_counter() - start) * 1e4)
    return best


def chained_call_us() -> tuple[float, float]:
    """The same as one of fifty in a graph, as in a model: ours, and a torch op with as many gradients."""
    x, g, none = torch.randn(64, requires_grad=True), torch.randn(64), torch.tensor(math.nan)
    clips = [tuple(torch.tensor(v, requires_grad=True) for v in (2.0, -1.5)) for _ in range(50)]

    def run(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        start, y = time.perf_counter(), x
        for high, low in clips:
            y = call(y, high, low)
        y.backward(g)
        return (time.perf_counter() - start) * 1e6 / len(clips)

    def ours(y: Tensor, high: Tensor, low: Tensor) -> Tensor:
        return ops.ulq_fake_quantize(y, high, low, none, none)[0]

    times = [(run(ours), run(torch.addcmul)) for _ in range(120)]  # in turns; the first ones warm up
    return min(t for t, _ in times[20:]), min(t for _, t in times[20:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="float32 only, less time per figure")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per call without --quick")
    parser.add_argument("--no-compile", action="store_true", help="leave Inductor out")
    parser.add_argument("--write", action="store_true", help="replace the CPU part of docs/performance.md")
    arguments = parser.parse_args()
    seconds = 0.15 if arguments.quick else arguments.seconds
    info = amct_ext.build_info()
    head = (
        f"{date.today()}, {processor()}, torch {torch.__version__}, {info['compiler']}, {info['simd']}. "
        "Ours, the floor and `clone` in turns; ratios are medians of the rounds' ratios, so they need not be the ratio "
        "of the medians beside them. ours/floor below 1 is faster than moving the same bytes with one torch call."
    )
    lines = [head, "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    print("\n".join(lines), flush=True)
    for row in ROWS:
        if arguments.quick and row.dtype != torch.float32:
            continue
        for count in (1, 2):
            lines.append(measure(row, count, seconds, not arguments.no_compile))
            print(lines[-1], flush=True)
    one, torch_one = chained_call_us()
    lines += [
        "",
        f"Small call (64 elements, forward and backward with autograd): {small_call_us():.1f} us alone; "
        f"{one:.1f} us as one of fifty in a graph, where `addcmul` takes {torch_one:.1f}.",
    ]
    print("\n".join(lines[-2:]))
    if arguments.write:
        write_part(BEGIN, END, lines)


if __name__ == "__main__":
    main()
