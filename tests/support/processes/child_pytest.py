"""pytest in a child process, for what a process has only one of: a PrivateUse1 device, the kernels of a key."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(*command: object, **variables: str) -> str:
    """Run a command at the root of the repository; its output. AssertionError, with all it printed, where it fails."""
    done = _start(command, variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Report:
    """What the tests of a child came to, by the stem of their file."""

    def __init__(self, junit: Path) -> None:
        self.passed: Counter[str] = Counter()
        self.failures: defaultdict[str, list[str]] = defaultdict(list)
        for case in ET.parse(junit).getroot().iter("testcase"):
            file = case.get("classname", "").rpartition(".")[2]
            bad = [e for e in case if e.tag in ("failure", "error")]
            self.failures[file] += [f"{case.get('name')}\n{e.text}" for e in bad]
            self.passed[file] += not bad and case.find("skipped") is None

    def check(self, file: str, at_least: int = 1) -> None:
        """AssertionError where a test of the file failed, or fewer passed."""
        assert not self.failures[file], "\n\n".join(self.failures[file])
        assert self.passed[file] >= at_least


def pytest_in_child(folder: Path, *arguments: object, prefix: tuple[str, ...] = (), **variables: str) -> Report:
    """Run pytest with `arguments`, its report in `folder`. `prefix` is a command that starts the interpreter."""
    junit = folder / "report.xml"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = (
        *prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *arguments,
    )  # fmt: skip
    done = _start(command, {"PYTHONPATH": paths, **variables})
    assert done.returncode in (0, 1) and junit.is_file(), done.stdout[-6000:] + done.stderr[-3000:]
    return Report(junit)


def _start(command: tuple[object, ...], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    return subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, env=environment, cwd=ROOT
    )
