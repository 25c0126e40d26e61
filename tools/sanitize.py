"""Run the op tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py [pytest arguments]

Builds into build/sanitize beside the ordinary build, which stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"


def main() -> int:
    package = BUILD / "package" / "amct_ext"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "amct_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    settings = {
        "AMCT_SANITIZE": "ON",
        "AMCT_TORCH_ROOT": str(Path(torch.__file__).parent),
        "AMCT_TORCH_VERSION": torch.__version__,
        "CMAKE_INSTALL_PREFIX": str(package),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD / "cmake", "-G", "Ninja", *defined], check=True)
    subprocess.run(["cmake", "--build", BUILD / "cmake"], check=True)
    subprocess.run(["cmake", "--install", BUILD / "cmake", "--component", "python"], check=True)

    # The interpreter is not instrumented: the runtime comes first by LD_PRELOAD; its own leaks are not ours. libstdc++
    # must be there from the start for exceptions to be intercepted.
    compiler = os.environ.get("CXX", "c++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    # torch.compile starts compilers that would inherit the preloaded runtime.
    tests = [str(path) for path in sorted((ROOT / "tests").glob("test_ops_*.py"))]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not compile",
        *tests,
        *sys.argv[1:],
    ]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
