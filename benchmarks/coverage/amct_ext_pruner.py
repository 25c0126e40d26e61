"""Channel pruning by amct_ext."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import amct_ext as amct
from benchmarks.coverage.layers import Layers, call, macs, parameters, widths_of
from benchmarks.coverage.results import Pruned

# Words of the errors that create raises then.
_NOTHING_TO_PRUNE = ("no layer can lose channels", "no layer of the model can be pruned that way")
_MAX_REASONS = 12
_PATH = re.compile(r"/[\w./]+")  # of an operator in the traced graph
_SHAPE = re.compile(r"\[[-\dN, ]+\]")


def configuration(folder: Path, ratio: float, quantise: bool = True, profile: str = "AMCT") -> tuple[str, str]:
    """Paths of a configuration file, written, and of the record. Nothing is pruned at ratio 0."""
    lines = [f"profile: {profile}"]
    if ratio:
        lines.append(
            f"prune_config {{ filter_pruner {{ balanced_l2_norm_filter_prune {{ prune_ratio: {ratio} "
            "ascend_optimized: false } } }"
        )
    if quantise:
        lines.append("batch_num: 1 retrain_data_quant_config { ulq_quantize { } }")
        lines.append("retrain_weight_quant_config { arq_retrain { } }")
    path = folder / "coverage.cfg"
    path.write_text("\n".join(lines) + "\n")
    return str(path), str(folder / "record.txt")


def nothing_to_prune(error: Exception) -> bool:
    """Whether create refuses a model because none of its channels can go."""
    return any(words in str(error) for words in _NOTHING_TO_PRUNE)


def prune(model: nn.Module, inputs: tuple[Any, ...], layers: Layers, whole: int, ratio: float) -> Pruned:
    """`whole`: multiplications of the unpruned model. Exceptions become the error of the result."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _captured_reasons() as captured:
        paths = configuration(Path(folder), ratio, quantise=False)
        try:
            pruned = amct.create_prune_retrain_model(copy.deepcopy(model), inputs, *paths)
        except Exception as error:
            reasons = _counted(captured, model, layers, ratio)
            if nothing_to_prune(error):
                return Pruned(note="create refuses: no channels to prune", reasons=reasons)
            text = describe(error).replace(f"{folder}/", "")
            return Pruned(error=f"create: {text}", reasons=reasons)
    seconds = time.perf_counter() - began
    wrong = other_outputs(model, pruned, inputs)
    if wrong:
        return Pruned(error=wrong)
    proof, note = _proof(model, pruned, inputs)
    result = smaller(model, pruned, inputs, layers, whole, seconds)
    return replace(result, note=note, proof=proof, reasons=_reasons(pruned, layers, ratio, dict(captured)))


def smaller(
    model: nn.Module, pruned: nn.Module, inputs: tuple[Any, ...], layers: Layers, whole: int, seconds: float
) -> Pruned:
    """What is left of a model; `whole`: its multiplications before."""
    left = widths_of(pruned, layers.widths)
    return Pruned(
        pruned=sum(width - left.get(name, width) for name, width in layers.widths.items()),
        parameters_left=parameters(pruned) / parameters(model),
        macs_left=macs(pruned, inputs) / max(whole, 1),
        seconds=round(seconds, 2),
    )


def other_outputs(model: nn.Module, pruned: nn.Module, inputs: tuple[Any, ...]) -> str:
    """What is wrong with the outputs of the smaller model, '' for nothing: it fails, or their shapes differ.

    The first size is not compared: how many boxes a detector returns depends on the weights.
    """
    with torch.no_grad():
        wanted = [tensor.shape[1:] for tensor in call(model, inputs)]
        try:
            found = [tensor.shape[1:] for tensor in call(pruned.eval(), inputs)]
        except Exception as error:
            return f"the smaller model: {describe(error)}"
    if found != wanted:
        return f"the smaller model has outputs of {_shapes(found)} instead of {_shapes(wanted)}"
    return ""


def _shapes(sizes: Sequence[torch.Size]) -> str:
    return ", ".join(str([..., *size]).replace("Ellipsis", "...") for size in sizes[:3])


def describe(error: BaseException) -> str:
    """Type and first line, short; the traceback goes to the standard error."""
    traceback.print_exception(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:240]


def _proof(model: nn.Module, pruned: nn.Module, inputs: tuple[Any, ...]) -> tuple[float | None, str]:
    """The difference that the proof of the removal finds, or why there is none."""
    try:
        return amct.verify_pruning(model, pruned, inputs).error, ""
    except Exception as error:
        return None, f"proof: {describe(error)}"


def _reasons(pruned: nn.Module, layers: Layers, ratio: float, logged: Mapping[str, str]) -> dict[str, int]:
    """Why channels stayed, without the names of layers -> how many of the asked ones stayed for it.

    What the trial forward fails with is logged only, and told without its numbers.
    """
    explained = {name: item.not_pruned for name, item in amct.explain(pruned).items() if item.not_pruned}
    tried = {name: re.sub(r"\d+", "N", why) for name, why in logged.items() if "would fail" in why}
    reasons = explained | {name: why for name, why in tried.items() if name in explained}
    return _counted(reasons.items(), pruned, layers, ratio)


def _counted(reasons: Iterable[tuple[str, str]], model: nn.Module, layers: Layers, ratio: float) -> dict[str, int]:
    named = [*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    names = [name for name, _ in named if name not in ("", "model")]  # "the model" is a word of the reasons
    ordered = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w./])(?:{'|'.join(ordered)})(?![\w.])")
    counts: Counter[str] = Counter()
    for name, why in reasons:
        if name in layers.widths:
            without = _PATH.sub("OP", pattern.sub("LAYER", why))
            counts[_SHAPE.sub("SHAPE", without)[:200]] += int(layers.widths[name] * ratio)
    return dict(counts.most_common(_MAX_REASONS))


class _ReasonHandler(logging.Handler):
    """Layers and reasons that create logs; an error lists the first of them only."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.reasons: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        name, separator, why = record.getMessage().partition(" is not pruned: ")
        if separator:
            self.reasons.append((name, why))


@contextlib.contextmanager
def _captured_reasons() -> Iterator[list[tuple[str, str]]]:
    logger, handler = logging.getLogger("amct_ext"), _ReasonHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.reasons
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
