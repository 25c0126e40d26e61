"""Benchmarks, run from the root of the repository: `python -m benchmarks.ops.report`; pytest takes `bench_ops.py`."""
