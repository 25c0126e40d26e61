"""The demo's report: one table, one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from measure import channels, packed_bytes, weight_count
from rich.table import Table
from runs import Run
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.record import Record

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

GREY, COLOURS, KILL = "#6b7280", ("#2563eb", "#d97706"), "#dc2626"


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
    result = Table(title="digits: accuracy on 540 unseen images, size and speed")
    result.add_column("", no_wrap=True)
    for heading in ("after compression", "after retraining", "ONNX", "structure", "weights", "step"):
        result.add_column(heading, justify="right")
    before, size = sum(channels(float_model).values()), 4 * weight_count(float_model)
    step = times["float32"]
    result.add_row(
        "float32", "", f"{100 * float_accuracy:.2f} %", "", f"{before} channels", f"{size:,} B", f"{step:.1f} ms"
    )
    for item in done:
        stored = packed_bytes(item.model, item.masks)
        result.add_row(
            item.name,
            f"{100 * item.before:.2f} %",
            f"{100 * item.after:.2f} %",
            f"{100 * item.onnx:.2f} %",
            zeros(item.masks) if item.masks else f"{sum(channels(item.model).values())} channels",
            f"{stored:,} B ({size / stored:.1f}x less)",
            f"{times[item.name]:.1f} ms ({times[item.name] / step:.2f}x)",
        )
    return result


def picture(path: Path, float_model: nn.Module, float_run: Run, done: Sequence[Compressed], per_epoch: int) -> None:
    figure, ((loss, score), (scale, structure)) = plt.subplots(2, 2, figsize=(15, 9), layout="constrained")
    figure.suptitle("Handwritten digits: compressed, retrained, killed, restored", fontsize=15)
    _curves(loss, score, float_run, done, per_epoch)
    names = [r.key for r in done[0].record.quant]
    _scales(scale, names, done)
    _structure(structure, names, float_model, done)
    for axes in (loss, score, scale, structure):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(loss: Axes, score: Axes, float_run: Run, done: Sequence[Compressed], per_epoch: int) -> None:
    """Retraining is drawn behind the float training it starts from."""

    def epochs(steps: Mapping[int, float], after: float = 0.0) -> list[float]:
        return [after + step / per_epoch for step in steps]

    first = max(float_run.losses) / per_epoch
    loss.semilogy(epochs(float_run.losses), list(float_run.losses.values()), color=GREY, lw=1, label="float32")
    score.plot(epochs(float_run.accuracies), _percent(float_run), color=GREY, marker=".", label="float32")
    for item, colour in zip(done, COLOURS, strict=True):
        whole, resumed = item.whole.losses, item.resumed.losses
        loss.semilogy(epochs(whole, first), list(whole.values()), color=colour, lw=3, alpha=0.3, label=item.name)
        loss.semilogy(
            epochs(resumed, first),
            list(resumed.values()),
            color=colour,
            lw=0.9,
            label="   the same, restored after the kill",
        )
        score.plot(
            [first, *epochs(item.whole.accuracies, first)],
            [100 * item.before, *_percent(item.whole)],
            color=colour,
            marker=".",
            label=f"{item.name} ({100 * item.before:.1f} % before retraining)",
        )
    kill = max(done[0].killed.losses)
    for axes in (loss, score):
        axes.axvline(first, color=GREY, lw=1, ls=":")
        axes.axvline(first + kill / per_epoch, color=KILL, lw=1.5, label=f"SIGKILL at step {kill} of the retraining")
        axes.set_xlabel("epoch")
    loss.set(title="training loss", ylabel="cross-entropy")
    score.set(title="accuracy on the test set", ylabel="%", ylim=(None, 101))


def _percent(run: Run) -> list[float]:
    return [100 * value for value in run.accuracies.values()]


def _scales(axes: Axes, names: Sequence[str], done: Sequence[Compressed]) -> None:
    for item, colour, shift in zip(done, COLOURS, (-0.12, 0.12), strict=True):
        for at, name in enumerate(names):
            factors = item.record.quant_of(name)
            assert factors is not None
            weight = factors.scale_w
            first = {"label": f"{item.name}: weights, per channel"} if at == 0 else {}
            axes.semilogy([at + shift] * len(weight), weight, ".", color=colour, alpha=0.25, ms=5, mew=0, **first)
            first = {"label": f"{item.name}: activations"} if at == 0 else {}
            axes.semilogy([at + shift], [factors.scale_d], "D", color=colour, ms=7, **first)
    axes.set(title="scale of each layer (one INT8 step)", ylabel="scale")
    _layer_ticks(axes, names)


def _structure(axes: Axes, names: Sequence[str], float_model: nn.Module, done: Sequence[Compressed]) -> None:
    originals = dict(float_model.named_modules())
    for item, colour, shift in zip(done, COLOURS, (-0.2, 0.2), strict=True):
        layers, masks = dict(item.model.named_modules()), item.masks
        shares = []
        for name in names:
            kept = int(masks[name].sum()) if name in masks else layers[name].weight.numel()
            shares.append(100 * kept / originals[name].weight.numel())
        bars = axes.bar(
            [at + shift for at in range(len(names))], shares, 0.38, color=colour, alpha=0.8, label=item.name
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set(title="weights that remain in each layer", ylabel="% of the float model", ylim=(0, 119))
    _layer_ticks(axes, names)


def _layer_ticks(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
