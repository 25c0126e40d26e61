"""Tasks by name, and the settings that each is measured in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.face import Face
from benchmarks.accuracy.tasks.image import Digits, Mobile
from benchmarks.accuracy.tasks.series import Watch
from benchmarks.accuracy.tasks.speech import Vad
from benchmarks.accuracy.tasks.text import Lm, LmSmall

TASKS: dict[str, type[Task]] = {task.name: task for task in (Mobile, Digits, Vad, Lm, LmSmall, Watch, Face)}


@dataclass(frozen=True)
class Setting:
    """How far a network is compressed; activations always have 8 bits."""

    name: str
    about: str
    weight_bits: int = 8
    sparse: bool = False
    prune: float = 0.0


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("float", "float"),
        Setting("int8", "INT8"),
        Setting("int4", "INT4 weights", weight_bits=4),
        Setting("sparse", "2:4 + INT8", sparse=True),
        Setting("half", "half of the channels + INT8", prune=0.5),
    )
}
MEASURED: dict[str, tuple[str, ...]] = {
    "vad": ("int8", "int4"),
    "lm": ("int8", "int4", "sparse"),
    "mobile": ("int8", "half"),
    "digits": ("int8", "half"),
    "watch": ("int8", "int4"),
    "face": ("int8", "int4"),
}


def load_task(name: str, cache: Path) -> Task:
    return TASKS[name](cache)
