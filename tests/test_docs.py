"""What the documents name is there: the tests that hold a row, the files, the public names."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import op_table
import pytest

import amct_ext

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@functools.cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@each_document
def test_named_tests_exist(document: Path) -> None:
    text = document.read_text()
    files: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        files.setdefault(path.stem, set()).update(functions(path))
    named = re.findall(r"`(test_\w+)(?:\.(test_\w+))?(?:\[[^`]*\])?`", text)
    missing = [
        ".".join(filter(None, (file, name)))
        for file, name in named
        if file not in files or (name and name not in files[file])
    ]
    assert not missing


@each_document
def test_named_cases_exist(document: Path) -> None:
    """`test_removal.test_network[unet]`: a case of that name stands in the file."""
    named = re.findall(r"`(test_\w+)\.test_\w+\[([^`]*)\]`", document.read_text())
    texts = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [(file, case) for file, case in named if f'"{case}"' not in texts[file]]


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    assert not [target for target in targets if not (document.parent / target).exists()]


def test_the_table_of_ops_is_that_of_the_docstrings() -> None:
    document = op_table.DOCUMENT.read_text()
    assert document == op_table.with_table(document), "run tools/op_table.py"


def test_public_names_are_what_the_migration_guide_lists() -> None:
    """Each function of the package stands in the table of functions, or in another document."""
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    classes = {name for name in amct_ext.__all__ if isinstance(getattr(amct_ext, name), type)}
    assert not [name for name in amct_ext.__all__ if name not in text and name not in classes | {"TARGETS"}]


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], "README.md", "exec"), {})
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["net_deploy_model.onnx", "net_fake_quant_model.onnx"]
