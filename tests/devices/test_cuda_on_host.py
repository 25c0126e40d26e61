"""The CUDA kernels without a GPU: compiled for the host, a fiber per thread, under the tests of the ops."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.processes.child_pytest import ROOT, Report, pytest_in_child, run

BUILD = ROOT / "build" / "cuda_on_host"
SANITIZE = os.environ.get("AMCT_ON_HOST_SANITIZE", "")  # address,undefined or thread
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
FAMILIES = (
    "activation_ulq",
    "weight_arq",
    "weight_lsq",
    "weight_norms",
    "weight_quantize",
    "weight_scale_repair",
    "weight_scale_search",
    "sparsity_mask",
    "sparsity_sr_ste",
    "sparsity_weight",
    "calibration_search",
    "calibration_shift",
    "op_properties",
    "op_registration",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels for the host, built anew where a source has changed."""
    if shutil.which("c++") is None or shutil.which("ninja", path=PATH) is None:
        pytest.skip("needs a C++ compiler and ninja to compile csrc/cuda for the host")
    folder = BUILD.with_name(f"{BUILD.name}_{SANITIZE.replace(',', '_')}") if SANITIZE else BUILD
    run(
        "cmake", "-S", ROOT / "tests" / "native" / "cuda_on_host", "-B", folder, "-G", "Ninja",
        f"-DAMCT_TORCH_ROOT={Path(torch.__file__).parent}", f"-DAMCT_SANITIZE={SANITIZE}",
        PATH=PATH,
    )  # fmt: skip
    run("cmake", "--build", folder, PATH=PATH)
    return folder / "libcuda_on_host.so"


def preload() -> str:
    """The runtime of a sanitizer, which must be loaded before the interpreter."""
    names = {"": [], "thread": ["libtsan.so"]}.get(SANITIZE, ["libasan.so", "libubsan.so", "libstdc++.so"])
    return ":".join(run("c++", f"-print-file-name={name}").strip() for name in names)


@pytest.fixture(scope="module")
def report(library: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Report:
    """The selected families in one child process: a start of torch and pytest takes about as long as a family."""
    here = [item for item in request.session.items if isinstance(item, pytest.Function)]
    selected = [item.callspec.params["family"] for item in here if item.module is request.module]
    return pytest_in_child(
        tmp_path_factory.mktemp("report"),
        "-p", "kernels_on_host", *(f"tests/ops/test_{family}.py" for family in selected),
        "-k", "not compile and not documented and not documentation", "-m", "not cpu_kernels",
        prefix=("setarch", "-R") if SANITIZE == "thread" else (),  # ThreadSanitizer needs fixed addresses
        AMCT_ON_HOST=str(library),
        PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "native" / "cuda_on_host"))),
        LD_PRELOAD=preload(),
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",
        TSAN_OPTIONS="halt_on_error=1:report_signal_unsafe=0",
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_op_tests_hold_on_the_cuda_kernels(family: str, report: Report) -> None:
    report.check(f"test_{family}")
