"""The parts of docs/performance.md that benchmarks write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def write_part(begin: str, end: str, lines: Sequence[str]) -> None:
    """Puts the lines between the two markers in place of what is there."""
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.split(begin)[0] + "\n".join([begin, *lines, end]) + text.split(end)[1])
