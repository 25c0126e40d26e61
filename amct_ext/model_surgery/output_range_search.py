"""`range_search: OUTPUT`: the model is run again on calibration inputs, and its output decides between clips."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from amct_ext.common.ranks import all_reduce_sum_
from amct_ext.errors import ModelError
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import preserved_model_state, tensors_in
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.activation.range_search import ClipPair
from amct_ext.layers.activation.shared_input import SharedInputCache
from amct_ext.layers.forward_context import no_state_updates, state_updates_disabled
from amct_ext.model_surgery.lookup import compressed_modules
from amct_ext.model_surgery.session import ATTRIBUTE, Session, activation_quantizers

logger = logging.getLogger("amct_ext")
_MAX_INPUTS = 8  # the last ones of the calibration
_MAX_RUNS = 100  # of the model, each on one input
_MIN_INPUTS = 2  # as many decide that other clips are worse; all decide that they are better
_MAX_SINGLE_SEARCHES = 8  # quantisers tried one by one: those whose candidates differ most
_MIN_WIDTH_RATIO = 1.05  # a candidate this close in width to the present clips is not tried
_MAX_ERROR_RATIO = 0.999  # a candidate replaces the present clips at this error or below, relative to theirs
_FACTORS = 1.25, 1.1  # by which a range is widened or narrowed while that lowers the error


def keep_calibration_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward of a calibration: copy its input, because the forward may write into it."""
    session: Session = getattr(model, ATTRIBUTE)
    if torch.compiler.is_compiling() or state_updates_disabled():
        return
    if any(not quantizer.range_decided and quantizer.may_calibrate for quantizer in activation_quantizers(model)):
        try:
            session.calibration_inputs.append(Inputs(args, kwargs).copied())
        except Exception as error:  # such an input cannot be given again
            logger.debug("no copy of the input: %s", error)
        del session.calibration_inputs[:-_MAX_INPUTS]


@torch.no_grad()
def search_output_ranges(model: nn.Module) -> None:
    """Give quantisers that have just been calibrated clips with which the output is near to that of float activations.

    The model runs again on the last inputs of the calibration, 8 at most, and 100 times at most:

    1. With float activations and quantised weights: the targets.
    2. With each kind of candidate in all quantisers. The best kind stays.
    3. With other candidates for one quantiser at a time, those first whose candidates differ most.
    4. With the ranges of these quantisers widened or narrowed, by 1.25 and then by 1.1, as long as that helps.

    The error of a run is the squared difference to the target relative to the target's squares, summed over the
    outputs. Clips are taken where the sum over all inputs falls, and dropped where the first two or more have a larger
    one. Ranks average their candidates and add their errors, so all choose the same. Called on all of them after each
    training forward. State changed: the clips; buffers, attributes and random state are put back. Where the model
    cannot be run again, the ranges of least absolute error stay, with a warning.
    """
    session: Session = getattr(model, ATTRIBUTE)
    every = activation_quantizers(model)
    pending = [quantizer for quantizer in every if quantizer.calibrated and not quantizer.range_decided]
    session.output_search_pending = any(not quantizer.calibrated for quantizer in every)
    if not pending:
        return
    inputs, session.calibration_inputs = session.calibration_inputs, []
    quantizers, candidates = _candidates_of_all_ranks(pending)
    for quantizer in pending:
        quantizer.candidates, quantizer.range_decided = (), True
    if not quantizers:  # clips that were loaded
        return
    evaluator = _Evaluator(model, inputs, quantizers)
    try:
        with evaluator.prepared():
            chosen = _search(evaluator, candidates)
    except _CannotEvaluateError as error:
        chosen = [each[0] for each in candidates]
        logger.warning(
            "range_search: OUTPUT: the model cannot be run again on its calibration input (%s); the ranges of least "
            "absolute error are taken, as range_search: ABSOLUTE_ERROR does: layer '%s'%s",
            error, quantizers[0].layer, "" if len(quantizers) == 1 else f" and {len(quantizers) - 1} more",
        )  # fmt: skip
    for quantizer, clips in zip(quantizers, chosen, strict=True):
        quantizer.set_range(clips)


def _candidates_of_all_ranks(
    pending: Sequence[ActivationQuantizer],
) -> tuple[list[ActivationQuantizer], list[list[ClipPair]]]:
    """The quantisers that have candidates on any rank, and their candidates: the means over the ranks."""
    max_candidates = max(len(quantizer.candidates) for quantizer in pending)
    count = torch.tensor([float(max_candidates)], device=pending[0].clip_max.device)
    all_reduce_sum_(count)
    if not bool(count):
        return [], []
    table = torch.zeros(len(pending), 4, 3, dtype=torch.float64, device=count.device)
    for row, quantizer in zip(table, pending, strict=True):
        for slot, clips in zip(row, quantizer.candidates, strict=False):
            slot[0] = 1
            slot[1:] = torch.stack(clips)
    all_reduce_sum_(table)
    found = [i for i, row in enumerate(table[:, 0, 0].tolist()) if row]
    means = table[..., 1:] / table[..., :1].clamp_min(1)
    return [pending[i] for i in found], [[ClipPair(*clips.unbind()) for clips in means[i]] for i in found]


def _search(evaluator: _Evaluator, candidates: list[list[ClipPair]]) -> list[ClipPair]:
    """The clips of each quantiser: one kind of candidate for all, then changes for one quantiser at a time."""
    descent = _Descent(evaluator, [each[0] for each in candidates])
    best = 0
    for kind in range(1, len(candidates[0])):
        if descent.take([each[kind] for each in candidates]):
            best = kind
    widths = [[float(clips.high - clips.low) for clips in each] for each in candidates]
    spread = [max(each) / max(min(each), math.ulp(0.0)) for each in widths]
    order = sorted(range(len(candidates)), key=lambda i: -spread[i])[:_MAX_SINGLE_SEARCHES]
    for i in order:
        present = widths[i][best]
        for clips, width in zip(candidates[i], widths[i], strict=True):
            if max(width, present) > _MIN_WIDTH_RATIO * min(width, present):
                descent.take_for(i, clips)
    for factor in _FACTORS:
        for i in order:
            descent.scale(i, factor) or descent.scale(i, 1 / factor)
    return descent.clips


class _Descent:
    """The best clips so far of all quantisers, with the error that they have on each input."""

    def __init__(self, evaluator: _Evaluator, clips: list[ClipPair]) -> None:
        self.clips = clips
        self._evaluator = evaluator
        self._targets = [evaluator.output(number, None) for number in range(evaluator.num_inputs)]
        self._errors = [evaluator.error(number, clips, right) for number, right in enumerate(self._targets)]
        self._order = sorted(range(len(self._errors)), key=lambda number: -self._errors[number])

    def take(self, clips: list[ClipPair]) -> bool:
        """Take these clips for all quantisers if they are better; False where they are not or no run is left."""
        errors = list(self._errors)
        total = present = 0.0
        for count, number in enumerate(self._order, 1):
            if self._evaluator.num_runs >= _MAX_RUNS:
                return False
            errors[number] = self._evaluator.error(number, clips, self._targets[number])
            total, present = total + errors[number], present + self._errors[number]
            if count >= min(_MIN_INPUTS, len(errors)) and not total < _MAX_ERROR_RATIO * present:
                return False
        self.clips, self._errors = clips, errors
        return True

    def take_for(self, index: int, clips: ClipPair) -> bool:
        """The same for one quantiser."""
        return self.take([*self.clips[:index], clips, *self.clips[index + 1 :]])

    def scale(self, index: int, factor: float) -> bool:
        """Multiply the range of one quantiser while that is better; whether it was at all."""
        moved = False
        while self.take_for(index, ClipPair(*(end * factor for end in self.clips[index]))):
            moved = True
        return moved


class _CannotEvaluateError(ModelError):
    """Why a model cannot be run again or its output cannot be compared; raised on all ranks or on none."""


class _Evaluator:
    """Evaluates a model on inputs of its calibration with other clips."""

    def __init__(self, model: nn.Module, inputs: Sequence[Inputs], quantizers: Sequence[ActivationQuantizer]) -> None:
        self.model, self.quantizers = model, quantizers
        self.num_runs = 0
        kept = torch.zeros(2, device=quantizers[0].clip_max.device)
        kept[0], kept[1] = len(inputs), 1
        all_reduce_sum_(kept)
        self.num_inputs = max(1, int(kept[0] / kept[1]))  # of every rank; one that has fewer makes all ranks stop
        self._inputs = inputs[-self.num_inputs :]

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Within it all layers multiply floats; afterwards no quantiser keeps a result of these evaluations."""
        layers = [(layer, layer.product_choice) for layer in compressed_modules(self.model)]
        every = activation_quantizers(self.model)
        try:
            for layer, _ in layers:
                layer.product_choice = None
            yield
        finally:
            for layer, choice in layers:
                layer.product_choice = choice
            for quantizer in every:
                quantizer.shared = SharedInputCache()

    def output(self, number: int, clips: Sequence[ClipPair] | None) -> list[Tensor]:
        """The floating-point tensors that the model returns for an input; without clips those of float activations."""
        self.num_runs += 1
        found: list[Tensor] = []
        problem = ""
        every = activation_quantizers(self.model)
        for quantizer, own in zip(self.quantizers, clips or (), strict=False):
            quantizer.set_range(own)
        try:
            for quantizer in every:
                quantizer.bypassed = clips is None
            if number >= len(self._inputs):
                raise _CannotEvaluateError("it cannot be copied")
            if any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
                raise _CannotEvaluateError("its parameters are sharded")
            inputs = self._inputs[number].copied()
            with preserved_model_state(self.model), no_state_updates():
                output = self.model.forward(*inputs.args, **inputs.kwargs)
            found = [x.detach().double() for x in tensors_in(output) if x.is_floating_point() and x.numel()]
            found = [x for x in found if x.dim()] or found  # a loss beside what it is computed from
        except Exception as error:
            problem = str(error) if isinstance(error, _CannotEvaluateError) else f"{type(error).__name__}: {error}"
        finally:
            for quantizer in every:
                quantizer.bypassed = False
        if not problem and not found:
            problem = "it returns no floating-point tensor"
        if not problem and clips is None and not all(bool(torch.isfinite(x).all()) for x in found):
            problem = "its output is not finite"
        self._raise_on_any_rank(problem)
        return found

    def error(self, number: int, clips: Sequence[ClipPair], target: Sequence[Tensor]) -> float:
        """How far the output for an input is from the target; infinite where it is not finite."""
        output = self.output(number, clips)
        same = [x.shape for x in output] == [x.shape for x in target]
        self._raise_on_any_rank("" if same else "the shapes that it returns vary")
        total = target[0].new_zeros(())
        for x, right in zip(output, target, strict=True):
            total += (x - right).square().sum() / right.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        all_reduce_sum_(total)
        error = float(total)
        return error if math.isfinite(error) else math.inf

    def _raise_on_any_rank(self, problem: str) -> None:
        failed = torch.tensor(float(bool(problem)), device=self.quantizers[0].clip_max.device)
        all_reduce_sum_(failed)
        if bool(failed):
            raise _CannotEvaluateError(problem or "another rank says why")
