"""The CUDA kernels without a card: their sources compiled for the host, every thread a fiber, under the op tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda_on_host"
SANITIZE = os.environ.get("AMCT_ON_HOST_SANITIZE", "")  # address,undefined or thread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: object, **variables: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels for the host, built anew where a source has changed."""
    if shutil.which("c++") is None or shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.defpath}") is None:
        pytest.skip("needs a C++ compiler and ninja to compile csrc/cuda for the host")
    folder = BUILD.with_name(f"{BUILD.name}_{SANITIZE.replace(',', '_')}") if SANITIZE else BUILD
    run(
        "cmake", "-S", ROOT / "tests" / "native" / "cuda_on_host", "-B", folder, "-G", "Ninja",
        f"-DAMCT_TORCH_ROOT={Path(torch.__file__).parent}", f"-DAMCT_SANITIZE={SANITIZE}",
    )  # fmt: skip
    run("cmake", "--build", folder)
    return folder / "libcuda_on_host.so"


def preload() -> str:
    """The runtime of a sanitizer must come before an interpreter that knows nothing of it."""
    names = {"": [], "thread": ["libtsan.so"]}.get(SANITIZE, ["libasan.so", "libubsan.so", "libstdc++.so"])
    return ":".join(run("c++", f"-print-file-name={name}").strip() for name in names)


@pytest.mark.parametrize(
    "stems",
    [
        ["activation_ulq"],
        ["weight_arq", "weight_lsq", "weight_norms", "weight_quantize"],
        ["sparsity_mask"],
        ["sparsity_weight"],
        ["calibration_search", "calibration_shift"],
        ["op_properties"],
        ["op_registration"],
    ],
    ids="-".join,
)
def test_the_op_tests_hold_on_the_cuda_kernels(stems: list[str], library: Path) -> None:
    # The race detector needs memory where it expects it.
    fixed = ["setarch", "-R"] if SANITIZE == "thread" else []
    run(
        *fixed, sys.executable, "-m", "pytest", "-p", "kernels_on_host", "-p", "no:cacheprovider", "-q", "-x",
        *(f"tests/ops/test_{stem}.py" for stem in stems), "-k", "not compile and not documented and not documentation",
        "-m", "not cpu_kernels",
        AMCT_ON_HOST=str(library),
        PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "native" / "cuda_on_host"))),
        LD_PRELOAD=preload(),
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",
        TSAN_OPTIONS="halt_on_error=1:report_signal_unsafe=0",
    )  # fmt: skip
