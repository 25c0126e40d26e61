"""Raw results: one JSON line per model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.jsonl"
PARTS = ("ours", "peer", "quantised", "best")  # best: quantised with `profile: BEST`
DEFAULT_PARTS = PARTS[:3]


@dataclass(frozen=True)
class Pruned:
    """What a pruner did. `error`: why there is nothing. Shares of the whole model are 0 to 1."""

    error: str = ""
    pruned: int = 0
    parameters_left: float = 1.0
    macs_left: float = 1.0
    seconds: float = 0.0
    note: str = ""
    proof: float | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantised:
    """What became of the job: create, one training step, evaluation, restore, save.

    `stage`: where it ended with `error`. `weights`, `macs`: shares in INT8. `onnx`: difference between the outputs
    of the file and of the evaluation, of their norm. `noise`: that of evaluations whose layers' results are off by what
    another order of summation makes; a number near the middle of two codes then becomes the other one.
    """

    stage: str = ""
    error: str = ""
    weights: float | None = None
    macs: float | None = None
    create: float | None = None
    restore: float | None = None
    save: float | None = None
    equal: bool | None = None
    onnx: float | None = None
    noise: float | None = None
    first_line: str = ""

    @property
    def onnx_equal(self) -> bool | None:
        """Whether the file computes what the evaluation does; None where it was not run."""
        return None if self.onnx is None or self.noise is None else self.onnx <= 1e-5 + 3 * self.noise


@dataclass(frozen=True)
class Result:
    """All about one model. `asked`: channels that the ratio asks for. `error`: the model itself fails here.

    `versions`: commit that each part was measured by; `version`: that of the line.
    """

    model: str
    version: str = ""
    error: str = ""
    asked: int = 0
    parameters: int = 0
    macs: int = 0
    ours: Pruned | None = None
    peer: Pruned | None = None
    quantised: Quantised | None = None
    best: Quantised | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def to_line(result: Result) -> str:
    return json.dumps(asdict(result))


def from_line(line: str) -> Result:
    """Parts that a later version adds may be missing."""
    values: dict[str, Any] = json.loads(line)
    for name, cls in zip(PARTS, (Pruned, Pruned, Quantised, Quantised), strict=True):
        if values.get(name):
            known = {item.name for item in fields(cls)}
            values[name] = cls(**{key: value for key, value in values[name].items() if key in known})
    return Result(**values)


def append(result: Result, path: Path = RESULTS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(to_line(result) + "\n")


def read(path: Path = RESULTS) -> dict[str, Result]:
    """By model; of several lines of one the last counts, and for parts that it does not have an earlier one."""
    found: dict[str, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.strip():
            result = from_line(line)
            earlier = found.get(result.model, result)
            parts = {part: getattr(result, part) or getattr(earlier, part) for part in PARTS}
            own = {part: result.version for part in PARTS if getattr(result, part) is not None}
            versions = {**earlier.versions, **own, **result.versions}
            found[result.model] = replace(result, **parts, versions=versions)
    return found
