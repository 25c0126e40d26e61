"""Results as Markdown: accuracy by task and method, options, costs, what was left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median_high

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.results import Result, scores
from benchmarks.accuracy.statistics import summarize
from benchmarks.accuracy.tasks.registry import MEASURED, SETTINGS, TASKS

_NONE = "-"
_SEEDS = (0, 1, 2)  # of all tables but the comparison, which takes all that both have


def _of(results: Iterable[Result], task: str, setting: str, method: str) -> list[Result]:
    setting = "float" if METHODS[method].kind == "float" else setting
    return [r for r in results if (r.task, r.setting, r.method) == (task, setting, method)]


def _scores(results: Iterable[Result], task: str, setting: str, method: str) -> list[float]:
    return scores(r for r in _of(results, task, setting, method) if r.seed in _SEEDS)


def _cell(results: Sequence[Result], task: str, setting: str, method: str) -> str:
    values = _scores(results, task, setting, method)
    return summarize(values).text(TASKS[task].decimals) if values else _NONE


def _best(results: Sequence[Result], task: str, setting: str, methods: Iterable[str]) -> str | None:
    """The method with the best mean."""
    means = {m: summarize(v).mean for m in methods if (v := _scores(results, task, setting, m))}
    sign = 1 if TASKS[task].higher_is_better else -1
    return max(means, key=lambda m: sign * means[m]) if means else None


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def accuracy_table(results: Sequence[Result]) -> list[str]:
    """One table for each task: methods that have a result, by setting; the best of the peers and of ours are bold."""
    lines: list[str] = []
    for task, settings in MEASURED.items():
        listed = [m for m in METHODS.values() if m.kind != "option"]
        rows = []
        leaders = {s: {_best(results, task, s, [m.name for m in listed if m.kind == "peer"])} for s in settings}
        for setting in settings:
            leaders[setting].add(_best(results, task, setting, [m.name for m in listed if m.kind == "ours"]))
        for method in listed:
            cells = [_cell(results, task, setting, method.name) for setting in settings]
            if all(cell == _NONE for cell in cells):
                continue
            marked = [f"**{c}**" if method.name in leaders[s] else c for s, c in zip(settings, cells, strict=True)]
            rows.append([method.label, *marked])
        if not rows:
            continue
        budget = TASKS[task].budget
        how = f"{budget.steps} steps of {budget.batch}, AdamW {budget.lr:g}"
        lines += [f"**{task}**: {TASKS[task].about}. Score: {TASKS[task].score_name}; budget: {how}.", ""]
        lines += [*_markdown(["", *(SETTINGS[setting].about for setting in settings)], rows), ""]
    return lines[:-1]


def comparison_table(results: Sequence[Result]) -> list[str]:
    """The best peer beside the best of ours, and the mean of their differences over the seeds that both have.

    Seeds 0 to 2 choose the two; further seeds are no part of the choice.
    """
    kinds = {kind: [m.name for m in METHODS.values() if m.kind == kind] for kind in ("peer", "ours")}
    rows = []
    for task, settings in MEASURED.items():
        sign = 1 if TASKS[task].higher_is_better else -1
        for setting in settings:
            peer, own = (_best(results, task, setting, kinds[kind]) for kind in ("peer", "ours"))
            if peer is None or own is None:
                continue
            theirs, mine = ({r.seed: r.score for r in _of(results, task, setting, m)} for m in (peer, own))
            pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
            ahead = [sign * (a - b) for a, b in pairs if a is not None and b is not None]
            if ahead:
                text = summarize(ahead).text(TASKS[task].decimals)
                rows.append(
                    [
                        f"{task}, {SETTINGS[setting].about}",
                        METHODS[peer].label,
                        METHODS[own].label,
                        text,
                        str(len(ahead)),
                    ]
                )
    return _markdown(["", "best peer", "best of amct_ext", "amct_ext ahead by", "seeds"], rows)


def options_table(results: Sequence[Result]) -> list[str]:
    """Each option alone beside the default and BEST."""
    columns = [m for m in METHODS.values() if m.kind == "option"]
    lines = []
    for task, settings in MEASURED.items():
        for setting in settings:
            cells = {m.label: _cell(results, task, setting, m.name) for m in columns}
            tried = {label: cell for label, cell in cells.items() if cell != _NONE}
            if tried:
                ours = [f"default {_cell(results, task, setting, 'amct')}"]
                text = "; ".join([*ours, *(f"`{label}` {cell}" for label, cell in tried.items())])
                lines.append(f"| {task}, {SETTINGS[setting].about} | {text} |")
    return ["| task | each option alone |", "|---|---|", *lines] if lines else ["No results yet."]


def costs_table(results: Sequence[Result]) -> list[str]:
    """Median seconds by method and task: to compress and calibrate, then to train."""
    seconds: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.score is not None and result.seed in _SEEDS:
            seconds[result.method, result.task, result.setting].append(result)
    columns = [(task, setting) for task, settings in MEASURED.items() for setting in settings]
    rows = []
    for method in METHODS.values():
        cells = []
        for task, setting in columns:
            found = seconds.get((method.name, task, "float" if method.kind == "float" else setting), [])
            seconds_of = [[r.prepare_seconds for r in found], [r.train_seconds for r in found]]
            cells.append(" + ".join(f"{median_high(each):.0f}" for each in seconds_of) if found else _NONE)
        if any(cell != _NONE for cell in cells) and method.name != "float":
            rows.append([method.label, *cells])
    return _markdown(["s", *(f"{task} {setting}" for task, setting in columns)], rows)


def skipped_list(results: Sequence[Result]) -> list[str]:
    """Why peers have no number; each reason once."""
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for result in results:
        if result.skipped and METHODS[result.method].kind == "peer":
            reasons[METHODS[result.method].label][result.skipped] = None
    return [f"* {label}: {'; '.join(found)}" for label, found in reasons.items()] or ["Nothing."]
