"""pytest-benchmark suite of the range search and the shift search: `pytest benchmarks/ops/bench_search.py`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ops.bench_ops import run
from benchmarks.ops.rows import search_rows


@pytest.mark.parametrize("count", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("index", range(3))
def test_search(benchmark: Any, index: int, count: int) -> None:
    run(benchmark, list(search_rows())[index], count)
