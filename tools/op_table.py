"""Write the table of ops into docs/ops.md, from the docstrings: `.venv/bin/python tools/op_table.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from amct_ext import ops

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "ops.md"
_BLOCK = re.compile(r"(<!-- ops: begin[^>]*-->\n).*?(<!-- ops: end -->)", re.DOTALL)


def table() -> str:
    """The rows, as Markdown: name, first sentence of the docstring, gradients."""
    rows = ["| op | what it does | gradient |", "|---|---|---|"]
    for name in ops.__all__:
        text = inspect.getdoc(getattr(ops, name)) or ""
        summary = " ".join(text.partition("\n\n")[0].split()).removesuffix(".")
        gradient = re.search(r"\bGradients?: ([^.:(]+)", text)
        rows.append(f"| `{name}` | {summary} | {' '.join(gradient[1].split()) if gradient else 'none'} |")
    return "\n".join(rows) + "\n"


def with_table(document: str) -> str:
    """The document with the present table."""
    new, count = _BLOCK.subn(lambda block: block[1] + table() + block[2], document)
    if count != 1:
        raise ValueError(f"{DOCUMENT} has {count} blocks for the table of ops, not one")
    return new


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
