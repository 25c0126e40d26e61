"""Fixtures of the tests with other packages and with several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.processes.ranks import Ranks, two_ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """The processes of a file's distributed jobs."""
    with two_ranks() as running:
        yield running
