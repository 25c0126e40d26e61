"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.processes import onnx_translations
from support.processes.devices import DEVICES

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it and in whichever order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """What torch.compile made of a shared net counts against the limit of recompilations of later tests otherwise."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _keep_onnx_translations() -> None:
    onnx_translations.keep()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with data of real runs of AMCT: `AMCT_GOLDEN`, or `shared/golden` beside the repository."""
    folder = Path(os.environ.get("AMCT_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
    if not (folder / "load.py").is_file():
        pytest.skip(f"no golden data at {folder}: set AMCT_GOLDEN to the folder that holds load.py")
    return folder


@pytest.fixture(autouse=True)
def _count_golden(request: pytest.FixtureRequest) -> None:
    if "golden" in request.fixturenames:
        request.node.user_properties.append(("golden", ""))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line on the golden data: how much agrees, how much differs on purpose, how much is wrong."""
    reports = {
        outcome: [dict(r.user_properties) for r in terminalreporter.stats.get(outcome, []) if r.when == "call"]
        for outcome in ("passed", "failed")
    }
    passed = [p for p in reports["passed"] if "golden" in p]
    failed = [p for p in reports["failed"] if "golden" in p]
    if passed or failed:
        differ = sum("deviation" in p for p in passed)
        unbound = sum("unbound" in p and "deviation" not in p for p in passed)
        line = f"golden: {len(passed) - differ} passed, {differ} documented deviations, {len(failed)} failed"
        terminalreporter.write_line(line + f" (in {unbound} of those passed, noise decides AMCT's numbers)")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that is there."""
    return torch.device(request.param)
