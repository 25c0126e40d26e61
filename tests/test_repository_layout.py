"""The layout of the repository: files stay short, an op family has one stem in every folder, tests share by support."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 300  # lines
FAMILIES = ("activation_", "calibration_", "integer_", "sparsity_", "weight_")
OPS = sorted(path.stem for path in (ROOT / "amct_ext" / "ops").glob("*.py") if path.stem.startswith(FAMILIES))


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> Iterator[Path]:
    """Of what git carries or would carry, without copies of other projects and generated files."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("the files of the repository are listed by git: run the tests in a clone")
    for name in listed.stdout.splitlines():
        if name.endswith(suffixes) and "/vendor/" not in name and (ROOT / name).is_file():
            yield ROOT / name


def test_no_file_is_long() -> None:
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh")
    lengths = {path: path.read_text().count("\n") for path in sources(suffixes=suffixes)}
    assert not {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_test_imports_from_another() -> None:
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"conftest"}
    assert not [
        (path.name, module)
        for path in sources("tests")
        for module in imported(path)
        if module.rpartition(".")[2] in files
    ]


@pytest.mark.parametrize("op", OPS)
def test_ops_are_tested_in_a_file_of_their_name(op: str) -> None:
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_kernels_lie_in_a_file_named_like_their_reference(device: str) -> None:
    """`activation_ulq_state.cpp` counts: a kernel file may hold a part of what `ops/activation_ulq.py` has."""
    kernels = [
        path
        for path in sources(f"csrc/{device}", suffixes=(".cpp", ".cu"))
        if "TORCH_LIBRARY_IMPL(amct_ext" in path.read_text()
    ]
    assert kernels
    assert not [path.name for path in kernels if not path.stem.startswith(tuple(OPS))]
