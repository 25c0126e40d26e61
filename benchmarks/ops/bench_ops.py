"""pytest-benchmark suite of the ops: `pytest benchmarks/ops/bench_ops.py`; ratios to floor and rivals in extra_info.

Run as a program it prints the table of benchmarks/ops/report.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.ops.rows import Row, activation_rows, weight_rows
from benchmarks.timing import DTYPES, median_ms, threads

NAMES = [f"activation {i}" for i in range(4)] + [f"weight {i}" for i in range(12)]


def rows(dtype: torch.dtype) -> list[Row]:
    return [*activation_rows(dtype), *weight_rows(dtype)]


@pytest.mark.parametrize("count", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("index", range(16))
def test_op(benchmark: Any, index: int, dtype: torch.dtype, count: int) -> None:
    candidates = rows(dtype)
    if index >= len(candidates):
        pytest.skip("no such row for this dtype")
    run(benchmark, candidates[index], count)


def run(benchmark: Any, row: Row, count: int) -> None:
    """Time ours with pytest-benchmark, the floor and the rivals beside it."""
    with threads(count):
        benchmark(row.ours)
        ours = benchmark.stats.stats.median * 1e3
        benchmark.group = row.name
        benchmark.extra_info["floor"] = row.floor_name
        benchmark.extra_info["ratio to floor"] = round(ours / median_ms(row.floor), 3)
        for name, rival in (("eager", row.eager), ("torch op", row.torch_op), ("inductor", row.inductor)):
            if rival is not None:
                benchmark.extra_info[f"{name} / ours"] = round(median_ms(rival, 0.2, 1, 20) / ours, 2)


if __name__ == "__main__":
    from benchmarks.ops.report import main

    main()
