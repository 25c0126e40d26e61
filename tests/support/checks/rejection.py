"""A call that must raise a clear error and leave every file as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def rejected(folder: Path, error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises ``error`` with every word in its text, and leaves every file as it was."""
    before = contents(folder)
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    assert contents(folder) == before
