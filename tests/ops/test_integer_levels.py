"""The tests of the integer ops with every kernel of the product that this processor can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes.child_pytest import ROOT, pytest_in_child

import amct_ext

_FILES = [Path(__file__).with_name(f"test_integer_{stem}.py") for stem in ("product", "accumulators")]


def _in_use(**variables: str) -> subprocess.CompletedProcess[str]:
    """A process that prints the kernels in use."""
    text = "import amct_ext; info = amct_ext.build_info(); print(info['integer_product'], info['simd'])"
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", text], check=False, capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.parametrize("level", amct_ext.build_info()["integer_product_levels"])
def test_products_are_exact_on_every_level(level: str, tmp_path: Path) -> None:
    chosen = _in_use(AMCT_PRODUCT_LEVEL=level)
    if "this build has on this processor" in chosen.stderr:
        pytest.skip(f"this processor cannot run {level}")
    assert chosen.stdout.split()[0] == level
    report = pytest_in_child(tmp_path, *_FILES, AMCT_PRODUCT_LEVEL=level)
    for file in _FILES:
        report.check(file.stem, at_least=3)


def test_the_environment_chooses_the_levels() -> None:
    assert _in_use(AMCT_PRODUCT_LEVEL="baseline", AMCT_SIMD_LEVEL="baseline").stdout.split() == ["baseline", "baseline"]
    assert _in_use(AMCT_PRODUCT_LEVEL="", AMCT_SIMD_LEVEL="").returncode == 0


@pytest.mark.parametrize("variable", ["AMCT_PRODUCT_LEVEL", "AMCT_SIMD_LEVEL"])
def test_a_level_that_cannot_run_is_refused(variable: str) -> None:
    refused = _in_use(**{variable: "avx1024"})
    assert refused.returncode != 0
    assert f"{variable}=avx1024: this build has on this processor: baseline" in refused.stderr
