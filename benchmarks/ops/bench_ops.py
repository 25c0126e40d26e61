"""pytest-benchmark suite of the ops: `pytest benchmarks/ops/bench_ops.py`; ratios to floor and baselines in extra_info.

A row stands in the file of its op's stem, in the list `ROWS`: files whose name begins with a family are found by
themselves. `benchmarks/ops/report.py` tabulates the same rows.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

import benchmarks.ops
from benchmarks.ops.row import Row
from benchmarks.timing import median_ms, threads

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

_FAMILIES = ("activation_", "weight_", "sparsity_", "calibration_", "integer_")
_STEMS = sorted(name for _, name, _ in pkgutil.iter_modules(benchmarks.ops.__path__) if name.startswith(_FAMILIES))
ROWS: list[Row] = [row for stem in _STEMS for row in import_module(f"benchmarks.ops.{stem}").ROWS]


@pytest.mark.parametrize("count", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_op(benchmark: BenchmarkFixture, row: Row, count: int) -> None:
    """Time ours with pytest-benchmark, the floor and the baselines beside it."""
    calls = row.calls()
    with threads(count):
        benchmark(calls.ours)
        assert benchmark.stats is not None
        ours = benchmark.stats.stats.median * 1e3
        benchmark.group = row.name
        benchmark.extra_info["floor"] = calls.floor_name
        benchmark.extra_info["ratio to floor"] = round(ours / median_ms(calls.floor), 3)
        for name, baseline in (("eager", calls.eager), ("torch op", calls.torch_op), ("inductor", calls.inductor)):
            if baseline is not None:
                benchmark.extra_info[f"{name} / ours"] = round(median_ms(baseline, 0.2, 1, 20) / ours, 2)
