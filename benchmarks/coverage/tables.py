"""Results as Markdown: totals, a row per model, what failed, why channels stayed."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from amct_ext.explain.table import markdown_table
from benchmarks.coverage.results import Pruned, Quantised, Result

_NONE = "-"
_LABELS = {"ours": "pruning", "peer": "Torch-Pruning", "quantised": "job"}
_ENOUGH = 0.95  # of the asked channels
_MAX_PROOF = 1e-5
_MAX_REASONS = 25
_ALMOST_ALL = 0.99  # of the weights
_OVERSHOOT = 1.1  # times the asked channels
_POINTS = 0.02  # of parameters or multiplications left, beside the other pruner


def works(part: Pruned | None) -> bool:
    """Whether channels went and the smaller model runs."""
    return part is not None and not part.error and part.pruned > 0


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else _NONE


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.0f}"


def _left(part: Pruned) -> str:
    return f"{_percent(part.parameters_left)} / {_percent(part.macs_left)}"


def _pruned(part: Pruned | None) -> tuple[str, str]:
    if part is None:
        return _NONE, _NONE
    return ("fails", _NONE) if part.error else (str(part.pruned), _left(part))


def _seconds(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _checks(job: Quantised | None) -> str:
    if job is None:
        return _NONE
    words = {True: "equal", False: "differs", None: _NONE}
    return f"{words[job.equal]} / {words[job.onnx_equal]}"


def models_table(results: Iterable[Result]) -> list[str]:
    """One row for each model that could be measured."""
    head = (
        "model", "parameters, M", "asked", "pruned", "left, %", "Torch-Pruning", "left, %", "INT8, %",
        "create, restore, save, s", "restored / ONNX",
    )  # fmt: skip
    rows = []
    for result in results:
        if result.error:
            continue
        job = result.quantised or Quantised()
        times = ", ".join(map(_seconds, (job.create, job.restore, job.save)))
        rows.append((
            result.model, f"{result.parameters / 1e6:.1f}", str(result.asked), *_pruned(result.ours),
            *_pruned(result.peer), f"{_percent(job.weights)} / {_percent(job.macs)}", times, _checks(result.quantised),
        ))  # fmt: skip
    return markdown_table(head, rows).splitlines()


def totals(results: Sequence[Result]) -> list[str]:
    """Counts and sums as a table of two columns."""
    measured = [result for result in results if not result.error]
    rows = [("models measured", str(len(measured))), *_pruning_totals(measured), *_job_totals(measured)]
    rows += [(f"measured by commit, {label}", _commits(measured, part)) for part, label in _LABELS.items()]
    return markdown_table(("", ""), rows).splitlines()


def _commits(results: Iterable[Result], part: str) -> str:
    """The commits that the rows of a part were measured by, the commonest first."""
    found = Counter(result.versions.get(part) or "?" for result in results if getattr(result, part) is not None)
    return ", ".join(f"{commit} ({count})" for commit, count in found.most_common()) or _NONE


def _pruning_totals(results: Sequence[Result]) -> list[tuple[str, str]]:
    ours = [result for result in results if works(result.ours)]
    peer = [result for result in results if works(result.peer)]
    both = [result for result in ours if works(result.peer)]
    beside = [result for result in peer if result.ours is not None]
    measured = [result for result in results if result.ours is not None and result.peer is not None]
    only = (
        sum(works(result.ours) and not works(result.peer) for result in measured),
        sum(works(result.peer) and not works(result.ours) for result in measured),
    )
    proofs = [result.ours.proof for result in ours if result.ours is not None and result.ours.proof is not None]
    rows = [
        ("amct_ext prunes, the smaller model runs", _count(ours, results, lambda result: result.ours)),
        ("Torch-Pruning prunes, the smaller model runs", _count(peer, results, lambda result: result.peer)),
        ("models that amct_ext alone / Torch-Pruning alone prunes", f"{only[0]} / {only[1]}"),
        ("channels pruned by amct_ext", _of_asked(results, lambda result: result.ours)),
        ("channels pruned by Torch-Pruning", _of_asked(results, lambda result: result.peer)),
        ("where both prune: parameters left, amct_ext / Torch-Pruning", _both_left(both, "parameters")),
        ("where both prune: multiplications left, amct_ext / Torch-Pruning", _both_left(both, "macs")),
        (
            f"where Torch-Pruning prunes: amct_ext prunes {100 * _ENOUGH:.0f} % of the asked channels",
            f"{sum(map(_enough, beside))} of {len(beside)}",
        ),
        (
            f"where Torch-Pruning prunes: amct_ext leaves no more than {100 * _POINTS:.0f} points more of both",
            f"{sum(map(_as_small, beside))} of {len(beside)}",
        ),
    ]
    if proofs:
        rows.append(("largest difference that the proof of the removal finds", f"{max(proofs):.1e}"))
    return rows


def _count(some: Sequence[Result], results: Iterable[Result], part: Callable[[Result], Pruned | None]) -> str:
    return f"{len(some)} of {sum(part(result) is not None for result in results)}"


def _of_asked(results: Sequence[Result], part: Callable[[Result], Pruned | None]) -> str:
    measured = [(item, result.asked) for result in results if (item := part(result)) is not None]
    pruned = sum(item.pruned for item, _ in measured if not item.error)
    asked = sum(count for _, count in measured)
    return f"{pruned} of {asked}, {_share(pruned, asked)}"


def _both_left(results: Sequence[Result], what: str) -> str:
    def left(part: Callable[[Result], Pruned | None]) -> float:
        return sum(getattr(result, what) * getattr(part(result), f"{what}_left") for result in results)

    whole = sum(getattr(result, what) for result in results)
    return f"{_share(left(lambda result: result.ours), whole)} / {_share(left(lambda result: result.peer), whole)}"


def _enough(result: Result) -> bool:
    return result.ours is not None and works(result.ours) and result.ours.pruned >= _ENOUGH * result.asked


def _as_small(result: Result) -> bool:
    ours, peer = result.ours, result.peer
    return (
        ours is not None
        and peer is not None
        and works(ours)
        and ours.parameters_left <= peer.parameters_left + _POINTS
        and ours.macs_left <= peer.macs_left + _POINTS
    )


def _job_totals(results: Sequence[Result]) -> list[tuple[str, str]]:
    jobs = [result.quantised for result in results if result.quantised is not None]
    if not jobs:
        return []
    created = [job for job in jobs if job.create is not None]
    restored = [job.equal for job in jobs if job.equal is not None]
    saved = [job for job in jobs if job.save is not None]
    exact = [job.onnx_equal for job in jobs if job.onnx_equal is not None]
    almost_all = [job for job in created if (job.weights or 0) >= _ALMOST_ALL]
    return [
        ("create with quantisation works", f"{len(created)} of {len(jobs)}"),
        ("99 % of the weights and more in INT8", f"{len(almost_all)} of {len(created)}"),
        ("of the others with `profile: BEST`", _with_best(results)),
        ("restored bit for bit", f"{sum(restored)} of {len(restored)}"),
        ("saved", f"{len(saved)} of {len(created)}"),
        ("the file computes what the evaluation does", f"{sum(exact)} of {len(exact)}"),
        ("seconds of create, restore, save: median", ", ".join(_of_times(created, statistics.median))),
        ("seconds of create, restore, save: largest", ", ".join(_of_times(created, max))),
    ]


def _of_times(jobs: Sequence[Quantised], take: Callable[[list[float]], float]) -> list[str]:
    columns = ([getattr(job, name) for job in jobs] for name in ("create", "restore", "save"))
    return [_seconds(take(times) if (times := [t for t in column if t is not None]) else None) for column in columns]


def _is_short(job: Quantised | None) -> bool:
    """Whether a model that works has less than 99 % of its weights in INT8."""
    return job is not None and job.create is not None and (job.weights or 0) < _ALMOST_ALL


def _with_best(results: Sequence[Result]) -> str:
    """How many of those below 99 % are above it with `profile: BEST`."""
    short = [result for result in results if _is_short(result.quantised)]
    enough = [result for result in short if result.best is not None and (result.best.weights or 0) >= _ALMOST_ALL]
    return f"{len(enough)} of {len(short)}"


def shortfalls(results: Iterable[Result]) -> list[str]:
    """Models below what is aimed at, with what keeps them there."""
    lines = []
    for result in results:
        ours, peer, job = result.ours, result.peer, result.quantised
        if ours is not None and peer is not None and works(peer) and not (_enough(result) and _as_small(result)):
            told = f"{ours.pruned} of {result.asked} channels, {_left(ours)} % left"
            beside = f"Torch-Pruning {peer.pruned}, {_left(peer)} %" + (f" ({peer.note})" if peer.note else "")
            why = ours.error or "; ".join(list(ours.reasons)[:2])
            if not why and peer.pruned > _OVERSHOOT * result.asked:
                why = f"Torch-Pruning removes {peer.pruned / result.asked:.1f} times what is asked"
            lines.append(f"* `{result.model}`: {told}; {beside}" + (f": {_plain(why)}" if why else ""))
        if _is_short(job):
            assert job is not None
            best = "" if result.best is None else f"; with `profile: BEST` {_percent(result.best.weights)} %"
            lines.append(f"* `{result.model}`: {_plain(job.first_line)}{best}")
    return lines


def failures(results: Iterable[Result]) -> list[str]:
    """What does not work, model by model, each with its message."""
    lines = []
    for result in results:
        told = [("the model", result.error)]
        told += [("amct_ext", result.ours.error)] if result.ours is not None else []
        told += [("amct_ext", _proof_failure(result.ours))] if result.ours is not None else []
        told += [("Torch-Pruning", result.peer.error)] if result.peer is not None else []
        job = result.quantised
        if job is not None:
            told.append((f"amct_ext, quantised, {job.stage}", job.error))
            told.append(("amct_ext, restore", "" if job.equal is not False else "other bits than before"))
            off = f"the file is off by {job.onnx:.1e}, rounding by {job.noise:.1e}" if job.onnx_equal is False else ""
            told.append(("amct_ext, ONNX", off))
        lines += [f"* `{result.model}`, {where}: {_plain(text)}" for where, text in told if text]
    return lines


def _proof_failure(part: Pruned) -> str:
    if part.proof is not None and not part.proof <= _MAX_PROOF:
        return f"the proof of the removal finds a difference of {part.proof:.1e}"
    return part.note if part.note.startswith("proof") else ""


def _plain(text: str) -> str:
    """Without what Markdown would take for markup."""
    text = text.replace("](", "] (")  # no link
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").strip()


def reasons_table(results: Iterable[Result]) -> list[str]:
    """Why asked channels stayed, over the models below 95 %: those that concern most models first."""
    models: dict[str, list[str]] = defaultdict(list)
    channels: Counter[str] = Counter()
    for result in results:
        if result.ours is None or result.error or _enough(result):
            continue
        for why, count in result.ours.reasons.items():
            models[why].append(result.model)
            channels[why] += count
    order = sorted(models, key=lambda why: (-len(models[why]), -channels[why]))
    rows = [(str(len(models[why])), str(channels[why]), _plain(why), models[why][0]) for why in order[:_MAX_REASONS]]
    return markdown_table(("models", "channels", "reason", "for example"), rows).splitlines()
