"""The sample calls of every op give the same bits on every instruction set that this processor can run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import amct_ext

_SCRIPT = Path(__file__).resolve().parents[1] / "support" / "ops" / "result_bits.py"


@functools.cache
def results(level: str) -> dict[str, list[str]]:
    """A hash for each sample call, from a process that uses the loops of ``level``."""
    done = subprocess.run(
        [sys.executable, _SCRIPT],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "AMCT_SIMD_LEVEL": level},
    )
    if "this build has on this processor" in done.stderr:
        pytest.skip(f"this processor cannot run {level}")
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.cpu_kernels
@pytest.mark.slow
@pytest.mark.parametrize("level", [v for v in amct_ext.build_info()["simd_levels"] if v != "baseline"])
def test_every_op_gives_the_same_bits(level: str) -> None:
    baseline, found = results("baseline"), results(level)
    assert baseline.keys() == set(amct_ext.ops.__all__)
    assert [op for op, hashes in found.items() if hashes != baseline[op]] == []
