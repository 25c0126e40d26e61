"""Devices that torch knows only by a plug-in (PrivateUse1: NPUs): references, kernels of others, whole jobs.

They run on a stand-in that needs no hardware. A process cannot change its PrivateUse1 device, hence child processes.
"""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference_cost
from support.processes import standin
from support.processes.child_pytest import ROOT, Report, pytest_in_child

from amct_ext import backends, ops

OP_TESTS = (
    "sparsity_mask",
    "sparsity_weight",
    "activation_ulq",
    "weight_arq",
    "weight_lsq",
    "weight_norms",
    "weight_quantize",
)
needs_compiler = pytest.mark.skipif(
    standin.compiler() is None, reason="the stand-in device is compiled: no C++ compiler (c++ or $CXX) was found"
)


def child(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment}, cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip


def on_the_standin(folder: Path, *arguments: object) -> Report:
    return pytest_in_child(folder, *arguments, AMCT_TEST_DEVICE=standin.NAME)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Jobs and op tests with the plain-torch references, in one child process."""
    files = [f"tests/ops/test_{family}.py" for family in OP_TESTS]
    which = ("-k", f"device_cases or {standin.NAME}")
    return on_the_standin(tmp_path_factory.mktemp("report"), "tests/devices/device_cases.py", *files, *which)


@needs_compiler
@pytest.mark.slow
def test_references_kernels_and_jobs(report: Report) -> None:
    report.check("device_cases", at_least=41)


@needs_compiler
@pytest.mark.slow
def test_the_tests_of_the_ops_run_on_it(report: Report) -> None:
    for family in OP_TESTS:
        report.check(f"test_{family}")
    assert sum(report.passed[f"test_{family}"] for family in OP_TESTS) > 60


@needs_compiler
@pytest.mark.slow
def test_the_npu_adapter(tmp_path: Path) -> None:
    # The adapter's codes are integers, which have no -0: docs/npu.md.
    which = ("-k", f"(adapter or {standin.NAME}) and not signs_of_zero")
    report = on_the_standin(tmp_path, "tests/devices/npu_adapter_cases.py", "tests/ops/test_activation_ulq.py", *which)
    for file in ("npu_adapter_cases", "test_activation_ulq"):
        report.check(file)
    assert sum(report.passed.values()) > 60


BACKENDS = """
import torch

def good():
    torch.library.impl("amct_ext::mask_2to4", "xla")(lambda w, axis=1: torch.empty_like(w, dtype=torch.bool))
    print("good", len([s for s in torch._C._jit_get_all_schemas() if s.name.startswith("amct_ext::")]))

def bad():
    raise OSError("libdriver.so is missing")
"""
ENTRY_POINTS = """
[amct_ext.backends]
a_bad = fake_backend:bad
b_good = fake_backend:good
c_absent = no_such_module:register
"""


@pytest.fixture
def distribution(tmp_path: Path) -> str:
    """A folder with an installed distribution that offers three back ends, two of which fail."""
    info = tmp_path / "fake_backend-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-backend\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "fake_backend.py").write_text(BACKENDS)
    return os.pathsep.join([str(tmp_path), str(ROOT)])


def test_a_package_brings_kernels_by_an_entry_point(distribution: str) -> None:
    done = child("-c", "from amct_ext import backends; print(backends.kernels('xla'))", PYTHONPATH=distribution)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"good {len(ops.__all__)}", "('mask_2to4',)"]
    reports = done.stderr.splitlines()
    assert len(reports) == 2
    assert "'a_bad' (fake_backend:bad of fake-backend 1.2) failed" in reports[0]
    assert "OSError: libdriver.so is missing" in reports[0]
    assert "ModuleNotFoundError: No module named 'no_such_module'" in reports[1]
    assert all("references serve instead" in line and "AMCT_BACKENDS=0" in line for line in reports)


def test_entry_points_can_be_left_out(distribution: str) -> None:
    code = "import amct_ext.backends as b; print(b.kernels('xla'))"
    done = child("-c", code, PYTHONPATH=distribution, AMCT_BACKENDS="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "()\n", "")


def test_the_snippets_of_the_documentation_run() -> None:
    result = doctest.testmod(backends)
    assert (result.attempted, result.failed) == (2, 0)


def test_the_cost_of_the_references_is_counted_for_the_table() -> None:
    table = (ROOT / "docs" / "npu.md").read_text()
    for op, arguments in reference_cost.samples().items():
        calls, moved, _ = reference_cost.cost(backends.reference(op), arguments)
        assert calls > 1 and moved > 2
        assert f"| `{op}` |" in table


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="abacus"):
        backends.kernels("abacus")
