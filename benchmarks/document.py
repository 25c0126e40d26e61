"""The parts of documents that benchmarks write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def write_between(document: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Puts the lines between the two markers of a document in place of what is there."""
    text = document.read_text()
    document.write_text(text.split(begin)[0] + "\n".join([begin, *lines, end]) + text.split(end)[1])


def write_part(begin: str, end: str, lines: Sequence[str]) -> None:
    """The same in docs/performance.md."""
    write_between(DOCUMENT, begin, end, lines)
