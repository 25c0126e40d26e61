"""The parts of documents that benchmarks write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def write_between(document: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Puts the lines between the two markers of a document in place of what is there."""
    text = document.read_text()
    document.write_text(text.split(begin)[0] + "\n".join([begin, *lines, end]) + text.split(end)[1])


def show_parts(
    document: Path,
    parts: Mapping[str, Callable[[list[Result]], list[str]]],
    results: list[Result],
    source: str,
    write: bool,
) -> None:
    """Prints the named parts of a document, made of results; `write`: also puts them between their markers.

    source: the file that writes them, as the markers say.
    """
    for name, part in parts.items():
        lines = part(results)
        print("\n".join(lines), end="\n\n")
        if write:
            write_between(document, f"<!-- {name}: begin (written by {source}) -->", f"<!-- {name}: end -->", lines)


def write_part(begin: str, end: str, lines: Sequence[str]) -> None:
    """The same in docs/performance.md."""
    write_between(DOCUMENT, begin, end, lines)
