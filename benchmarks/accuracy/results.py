"""Raw results: one JSON line per run, one file per task."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """A score, or the reason why there is none. ``seconds``: compressing and calibrating, then the training."""

    task: str
    setting: str
    method: str
    seed: int
    score: float | None = None
    skipped: str = ""
    prepare_seconds: float = 0.0
    train_seconds: float = 0.0
    version: str = ""

    @property
    def run(self) -> tuple[str, str, str, int]:
        return self.task, self.setting, self.method, self.seed


def append(result: Result, folder: Path = RESULTS) -> None:
    entry = {key: value for key, value in asdict(result).items() if value not in ("", None)}
    with (folder / f"{result.task}.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read(folder: Path = RESULTS) -> dict[tuple[str, str, str, int], Result]:
    """Results by run; of several lines of one run the last counts."""
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines())
    return {result.run: result for result in (Result(**json.loads(line)) for line in lines if line.strip())}


def scores(results: Iterable[Result]) -> list[float]:
    return [result.score for result in results if result.score is not None]
