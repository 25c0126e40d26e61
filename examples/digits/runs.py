"""The parent's side of a training run: start the child, show its progress, kill it if asked to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

TRAIN = Path(__file__).with_name("train.py")


@dataclass
class Run:
    """What the parent saw of a run; steps count from 1."""

    losses: dict[int, float] = field(default_factory=dict)
    accuracies: dict[int, float] = field(default_factory=dict)
    saved: int = 0  # the last checkpoint


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]:<24}"),
        TimeElapsedColumn(),
        console=console,
    )


def watch(arguments: list[str], progress: Progress, label: str, kill_at: int | None = None) -> Run:
    """Runs `train.py` to its end, or until `kill_at` steps are reported: then SIGKILL, which no program can catch."""
    run, task = Run(), progress.add_task(label, total=None, note="starting")
    command = [sys.executable, str(TRAIN), *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True)
        try:
            for line in child.stdout or ():
                event = json.loads(line)
                _record(event, run, progress, task)
                if event["step"] == kill_at:
                    break
            if kill_at:
                child.kill()
            code = child.wait()
        finally:
            child.kill()  # if this process was interrupted, the child must not train on
        if code != (-signal.SIGKILL if kill_at else 0):
            errors.seek(0)
            raise RuntimeError(f"training run '{label}' ended with code {code}:\n{errors.read()}")
    if kill_at:
        progress.update(task, note=f"[red]killed at step {max(run.losses)}")
    return run


def _record(event: dict[str, float], run: Run, progress: Progress, task: TaskID) -> None:
    step = int(event["step"])
    run.losses[step] = event["loss"]
    if "accuracy" in event:
        run.accuracies[step] = event["accuracy"]
    if "saved" in event:
        run.saved = step
    shown = f" test {100 * list(run.accuracies.values())[-1]:.1f} %" if run.accuracies else ""
    progress.update(task, total=int(event["of"]), completed=step, note=f"loss {event['loss']:.3f}{shown}")
