"""The native parts without Python: C++ tests, a program that links the library, loops compared between levels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import amct_ext

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


def run(*command: object) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def build() -> Path:
    """The folder in which an editable install was built, brought up to date with the sources."""
    if not (BUILD / "CMakeCache.txt").is_file() or shutil.which("c++") is None:
        pytest.skip(f"needs a C++ compiler and the build folder {BUILD.relative_to(ROOT)} of an editable install")
    return BUILD


@pytest.mark.slow
def test_cpp_tests_pass(build: Path) -> None:
    if "GoogleTest was not found" in run("cmake", build, "-DAMCT_TESTS=ON"):
        pytest.skip("needs GoogleTest: libgtest-dev, or the Python package ros-gtest-vendor")
    run("cmake", "--build", build, "--target", "native_tests")
    print(run("ctest", "--test-dir", build / "tests" / "native", "--output-on-failure"))


@pytest.mark.slow
def test_a_cpp_program_trains_a_step(build: Path, tmp_path: Path) -> None:
    """The installed library as a C++ program uses it: found with CMake, linked, run."""
    if torch.version.cuda and shutil.which("nvcc") is None:
        pytest.skip("the package file of a torch with CUDA asks for the CUDA toolkit")
    run("cmake", "--install", build, "--component", "cpp", "--prefix", tmp_path / "installed")
    source = ROOT / "tests" / "native" / "consumer"
    found_at = f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'};{torch.utils.cmake_prefix_path}"
    run("cmake", "-S", source, "-B", tmp_path / "build", "-G", "Ninja", found_at)
    run("cmake", "--build", tmp_path / "build")
    assert run(tmp_path / "build" / "train_step").endswith("trained\n")


LEVELS = ("baseline", "v3", "v4", "v4bf16")
INCLUDE = ("-std=c++20", "-I", ROOT / "csrc")


def loops_of(level: str) -> Path:
    """The loops of an instruction set, as the normal build compiled them."""
    built = BUILD / "CMakeFiles" / f"amct_loops_{level}.dir" / "csrc" / "cpu" / "loops" / "table.cpp.o"
    if not built.is_file() or shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler and the build folder of an editable install with several instruction sets")
    return built


@pytest.mark.slow
def test_instruction_sets_agree_on_random_rows(tmp_path: Path) -> None:
    program, source = tmp_path / "test_levels", ROOT / "tests" / "native" / "test_levels.cpp"
    run("c++", *INCLUDE, "-O1", source, *map(loops_of, LEVELS), "-o", program)
    print(run(program))


@pytest.mark.slow
def test_avx512_loops_agree_where_the_processor_has_none(tmp_path: Path) -> None:
    """The loops of level v4, each AVX-512 instruction carried out lane by lane, against the baseline."""
    processor = Path("/proc/cpuinfo")
    if not processor.exists() or not {"avx2", "f16c"} <= set(processor.read_text().split()):
        pytest.skip("the stand-ins for AVX-512 take AVX2 and F16C")
    sources, loops = ROOT / "tests" / "native", tmp_path / "v4.o"
    run(
        "c++", "-I", sources / "avx512", *INCLUDE, "-O0", "-march=x86-64-v3", "-ffp-contract=off", "-fno-math-errno",
        "-fno-trapping-math", "-w", "-DAMCT_LEVEL=v4", "-c", ROOT / "csrc" / "cpu" / "loops" / "table.cpp", "-o", loops,
    )  # fmt: skip
    both = (loops_of("baseline"), loops)
    run("c++", *INCLUDE, "-O1", "-DAMCT_EMULATED", sources / "test_levels.cpp", *both, "-o", tmp_path / "test_levels")
    print(run(tmp_path / "test_levels"))
    hashes = []
    for level in ("baseline", "v4"):
        choice = tmp_path / f"{level}.cpp"
        choice.write_text(
            f'#include "cpu/loop_table.h"\nnamespace amct_ext::cpu {{\nextern const LoopTable loops_{level};\n'
            f"const LoopTable& loops() {{ return loops_{level}; }}\n}}\n"
        )
        run("c++", *INCLUDE, "-O1", sources / "kernel_bits.cpp", choice, *both, "-o", tmp_path / level)
        hashes.append(run(tmp_path / level))
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_integer_products_are_exact_on_every_instruction_set(build: Path, tmp_path: Path) -> None:
    objects = sorted((build / "CMakeFiles").glob("amct_product_*.dir/csrc/cpu/loops/integer_product.cpp.o"))
    levels = [path.parents[3].name.removeprefix("amct_product_").removesuffix(".dir") for path in objects]
    assert set(levels) == set(amct_ext.build_info()["integer_product_levels"])
    sources = (ROOT / "tests" / "native" / "product_levels.cpp", ROOT / "csrc" / "cpu" / "integer_product_level.cpp")
    defined = [f"-DAMCT_PRODUCT_{level.upper()}" for level in levels]
    run("c++", *INCLUDE, "-O1", *defined, *sources, *objects, "-o", tmp_path / "product_levels")
    print(run(tmp_path / "product_levels"))


@pytest.mark.slow
def test_half_divider_rounds_as_the_division_next_to_every_tie(tmp_path: Path) -> None:
    processor = Path("/proc/cpuinfo")
    if shutil.which("c++") is None or not processor.exists() or "fma" not in processor.read_text().split():
        pytest.skip("needs a C++ compiler and an x86 processor with FMA")
    program, source = tmp_path / "half_divider", ROOT / "tests" / "native" / "half_divider.cpp"
    run("c++", *INCLUDE, "-O2", "-march=x86-64-v3", "-ffp-contract=off", source, "-o", program)
    print(run(program))
