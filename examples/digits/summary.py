"""The demo's report: one table, one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from measure import channels, packed_bytes, weight_count
from rich.table import Table
from runs import Run
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.record.types import Record

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

GREY, COLOURS, KILL = "#6b7280", ("#2563eb", "#d97706"), "#dc2626"
SHIFTS = (-0.19, 0.19)  # of the two configurations within a layer's place


@dataclass(frozen=True)
class Compressed:
    """A configuration and what became of it. The runs: uninterrupted, killed, restored."""

    name: str
    model: nn.Module
    record: Record
    before: float
    after: float
    onnx: float
    whole: Run
    killed: Run
    resumed: Run

    @property
    def masks(self) -> dict[str, Tensor]:
        return {
            entry.name: ops.unpack_mask(torch.tensor(entry.mask, dtype=torch.int64), list(entry.mask_shape))
            for entry in self.record.sparse
            if entry.mask is not None
        }


def zeros(masks: Mapping[str, Tensor]) -> str:
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    return f"{100 * (1 - kept / total):.1f} % zeros"


def table(
    float_model: nn.Module, float_accuracy: float, done: Sequence[Compressed], times: Mapping[str, float]
) -> Table:
    """Accuracy of the float model, of the compressed one before and after retraining, and of its ONNX file."""
    result = Table(title="accuracy on the test set, size of the weights, time of a training step")
    result.add_column("", no_wrap=True)
    for heading in ("float", "compressed", "retrained", "ONNX", "structure", "weights", "step"):
        result.add_column(heading, justify="right", no_wrap=True)
    width, size, step = sum(channels(float_model).values()), 4 * weight_count(float_model), times["float32"]
    shown = (_percent(float_accuracy), "", "", "", f"{width} channels", f"{size:,} B", f"{step:.1f} ms")
    result.add_row("float32", *shown)
    for item in done:
        stored = packed_bytes(item.model, item.masks)
        result.add_row(
            item.name,
            "",
            _percent(item.before),
            _percent(item.after),
            _percent(item.onnx),
            zeros(item.masks) if item.masks else f"{sum(channels(item.model).values())} channels",
            f"{stored:,} B (1/{size / stored:.1f})",
            f"{times[item.name]:.1f} ms ({times[item.name] / step:.2f}x)",
        )
    return result


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def picture(path: Path, float_run: Run, float_model: nn.Module, done: Sequence[Compressed], per_epoch: int) -> None:
    figure, ((loss, score), (scale, structure)) = plt.subplots(2, 2, figsize=(16, 10), layout="constrained")
    _losses(loss, float_run, done, per_epoch)
    _accuracies(score, float_run, done, per_epoch)
    _scales(scale, done)
    _structure(structure, float_model, done)
    for axes in (loss, score, scale, structure):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    names = ["float32", *(item.name for item in done)]
    handles: list[Any] = [Patch(color=c, label=n) for c, n in zip((GREY, *COLOURS), names, strict=True)]
    handles.append(Line2D([], [], color=KILL, label=f"SIGKILL, {max(done[0].killed.losses)} steps into retraining"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=13)
    axes.set_title(note, loc="right", fontsize=10, color=GREY)


def _mark_events(axes: Axes, done: Sequence[Compressed], per_epoch: int) -> None:
    """Where retraining starts (epoch 0) and where the process was lost."""
    kill = max(done[0].killed.losses)
    axes.axvline(0, color=GREY, lw=1, ls=":")
    axes.axvline(kill / per_epoch, color=KILL, lw=1.5)
    axes.set_xlabel("epoch (below 0: float training)")


def _losses(axes: Axes, float_run: Run, done: Sequence[Compressed], per_epoch: int) -> None:
    """The restored run lies on the uninterrupted one; the steps that were lost and done again are dotted."""
    first = -max(float_run.losses)

    def draw(losses: Mapping[int, float], shift: int = 0, **style: Any) -> None:
        axes.semilogy([(shift + step) / per_epoch for step in losses], list(losses.values()), **style)

    draw(float_run.losses, first, color=GREY, lw=1)
    for item, colour in zip(done, COLOURS, strict=True):
        kept = {step: loss for step, loss in item.killed.losses.items() if step <= item.killed.saved}
        lost = {step: loss for step, loss in item.killed.losses.items() if step > item.killed.saved}
        draw(item.whole.losses, color=colour, lw=5, alpha=0.25)
        draw(kept | item.resumed.losses, color=colour, lw=1)
        draw(lost, color=KILL, lw=0, marker=".", ms=5)
    _mark_events(axes, done, per_epoch)
    _title(axes, "training loss", "band: uninterrupted   line: killed and restored   dots: lost steps, done again")
    axes.set_ylabel("cross-entropy of a batch")


def _accuracies(axes: Axes, float_run: Run, done: Sequence[Compressed], per_epoch: int) -> None:
    first = -max(float_run.losses)
    zoom = axes.inset_axes((0.30, 0.16, 0.67, 0.58))
    for at in (axes, zoom):
        epochs = [(first + step) / per_epoch for step in float_run.accuracies]
        at.plot(epochs, _percents(float_run), color=GREY, marker=".")
        for item, colour in zip(done, COLOURS, strict=True):
            epochs = [0, *(step / per_epoch for step in item.whole.accuracies)]
            at.plot(epochs, [100 * item.before, *_percents(item.whole)], color=colour, marker=".")
    _mark_events(axes, done, per_epoch)
    _mark_events(zoom, done, per_epoch)
    final = _percents(float_run)[-1]
    zoom.axhspan(final - 1, final, color=GREY, alpha=0.15)
    zoom.set(xlim=(-1.5, max(done[0].whole.losses) / per_epoch + 0.3), ylim=(final - 3, 100.1), xlabel="")
    zoom.grid(alpha=0.25)
    before = ", ".join(f"{100 * item.before:.1f} %" for item in done)
    _title(axes, "accuracy on the test set", f"grey: within one point of float   before retraining: {before}")
    axes.set(ylabel="%", ylim=(0, 103))


def _percents(run: Run) -> list[float]:
    return [100 * value for value in run.accuracies.values()]


def _scales(axes: Axes, done: Sequence[Compressed]) -> None:
    names = [entry.key for entry in done[0].record.quant]
    for item, colour, shift in zip(done, COLOURS, SHIFTS, strict=True):
        factors = [(names.index(entry.key), entry) for entry in item.record.quant if entry.key in names]
        points = [(at + shift / 2, w) for at, f in factors for w in f.scale_w]
        axes.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.4, ms=6, mew=0)
        points = [(at + shift / 2, f.scale_d) for at, f in factors]
        axes.plot(*zip(*points, strict=True), "D", color=colour, ms=7)
    axes.set_yscale("log")
    _title(axes, "scale of each layer", "diamonds: activations   dots: weights, per output channel")
    axes.set_ylabel("value of one INT8 step")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)


def _structure(axes: Axes, float_model: nn.Module, done: Sequence[Compressed]) -> None:
    originals = {n: m.weight.numel() for n, m in float_model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for item, colour, shift in zip(done, COLOURS, SHIFTS, strict=True):
        layers, masks = dict(item.model.named_modules()), item.masks
        kept = [int(masks[name].sum()) if name in masks else layers[name].weight.numel() for name in originals]
        shares = [100 * left / whole for left, whole in zip(kept, originals.values(), strict=True)]
        at = [place + shift for place in range(len(originals))]
        axes.bar_label(axes.bar(at, shares, 0.36, color=colour, alpha=0.8), fmt="%.0f", fontsize=9)
    _title(axes, "weights that remain", "of a pruned layer inputs and outputs are gone, of a 2:4 layer two of four")
    axes.set(ylabel="% of the float layer", ylim=(0, 108))
    axes.set_xticks(range(len(originals)), list(originals), rotation=30, ha="right", fontsize=9)
