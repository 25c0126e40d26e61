"""The op library without Python: a C++ program finds it with CMake, links it and runs the ops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


def run(*command: object) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_consumer_builds_and_runs(tmp_path: Path) -> None:
    if not (BUILD / "CMakeCache.txt").is_file() or shutil.which("c++") is None:
        pytest.skip(f"needs a C++ compiler and the build folder {BUILD.relative_to(ROOT)} of an editable install")
    run("cmake", "--install", BUILD, "--component", "cpp", "--prefix", tmp_path / "installed")
    run(
        "cmake", "-S", ROOT / "tests" / "cpp", "-B", tmp_path / "build", "-G", "Ninja",
        f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}", f"-DAMCT_TORCH_ROOT={Path(torch.__file__).parent}",
    )  # fmt: skip
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build" / "test_ops")
    run(tmp_path / "build" / "test_splitting")


@pytest.mark.slow
def test_instruction_sets_agree_on_random_rows(tmp_path: Path) -> None:
    built = {path.parts[-5]: path for path in BUILD.glob("CMakeFiles/amct_loops_*.dir/csrc/cpu/isa/loops.cpp.o")}
    levels = [f"amct_loops_{level}.dir" for level in ("baseline", "v3", "v4", "v4bf16")]
    if not all(level in built for level in levels) or shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler and the build folder of an editable install with several instruction sets")
    program = tmp_path / "test_levels"
    sources = [ROOT / "tests" / "cpp" / "test_levels.cpp", *(built[level] for level in levels)]
    sanitized = "AMCT_SANITIZE:BOOL=ON" in (BUILD / "CMakeCache.txt").read_text()
    flags = ["-fsanitize=address,undefined"] if sanitized else []
    run("c++", "-std=c++20", "-O1", *flags, "-I", ROOT / "csrc", *sources, "-o", program)
    print(run(program))
