"""The quantiser of an activation: learned clips, started by a range search."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.config.plan import DataQuant
from amct_ext.errors import InvalidDataError
from amct_ext.layers.cached_item import CachedItem
from amct_ext.layers.calibration_data import CalibrationData, batch_range, is_resumable
from amct_ext.layers.forward_context import host_can_read, state_updates_disabled
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.integer_autograd import QuantizedActivation
from amct_ext.layers.precision import KeepsPrecision
from amct_ext.layers.shared_input import SharedInputCache

_NAN = float("nan")


class ClipRange(NamedTuple):
    """Clips to quantise one input with."""

    clip_max: Tensor
    clip_min: Tensor
    prev_clip_max: Tensor
    prev_clip_min: Tensor
    kept: bool  # the quantiser's own, so that what a forward makes of them is written back


class ActivationQuantizer(KeepsPrecision):
    """Fake quantisation of an activation with learned clips (ULQ), started by a range search (IFMR).

    Without configured clips the first ``batch_num`` training forwards calibrate: each but the last uses the range of
    its own batch, the last one searches the clips on all data gathered. An evaluation before that uses a range of its
    own and keeps nothing. Parameters: ``clip_max``, ``clip_min`` (0-dim). Buffers: ``prev_clip_max``,
    ``prev_clip_min``, ``scale``, ``offset`` (of the last forward), ``invalid`` (sticky: NaN/Inf was seen),
    ``batches_seen`` (a float, so that an average of the model carries it too). The data of a calibration under way are
    in no state dict: after a load it starts over. The effective clips are written back to the parameters by every
    forward, as AMCT does. Source: AMCT's activation ULQ and IFMR.
    """

    clip_max: nn.Parameter
    clip_min: nn.Parameter
    prev_clip_max: Tensor
    prev_clip_min: Tensor
    scale: Tensor
    offset: Tensor
    invalid: Tensor
    batches_seen: Tensor

    def __init__(self, plan: DataQuant, fixed_min: bool, batch_num: int, layer: str, device: torch.device) -> None:
        super().__init__()
        self.layer = layer
        self.num_bits = plan.num_bits
        self.fixed_min = fixed_min
        self.batch_num = 0 if plan.clip_max is not None else batch_num
        # Equal clips are those of nobody: an average over floats alone, made before the calibration, tells them apart.
        start_max = 1.0 if plan.clip_max is None else plan.clip_max
        start_min = 1.0 if plan.clip_min is None else plan.clip_min
        self.clip_max = nn.Parameter(torch.tensor(start_max, dtype=torch.float32, device=device))
        self.clip_min = nn.Parameter(torch.tensor(start_min, dtype=torch.float32, device=device))
        for name in ("prev_clip_max", "prev_clip_min", "scale", "offset"):
            self.register_buffer(name, torch.tensor(_NAN, dtype=torch.float32, device=device))
        self.register_buffer("invalid", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.float32, device=device))
        self.calibration = CalibrationData()
        self.evaluated: ClipRange | None = None  # by the last evaluation, while there is no calibration: no state
        self.tracker = ForwardTracker()
        self.validate_now = False
        self.stash = True
        self.num_readers = 1
        self.shared: SharedInputCache[tuple[Tensor, ...]] = SharedInputCache()
        self.shared_codes: SharedInputCache[QuantizedActivation] = SharedInputCache()
        self.found_clips: Literal["", "provisional", "final"] = ""  # by the last forward, on this rank's data alone
        self.clip_writes = 0  # to the clips, by forwards: versions that mean no change
        self._seen = CachedItem(0, settled=self.batch_num)
        self._calibrated_in: int | None = None  # forward of the model

    @property
    def calibrated(self) -> bool:
        """Whether the calibration is finished."""
        return self._seen.read(self.batches_seen) >= self.batch_num

    @property
    def ready(self) -> bool:
        """Whether an evaluation can use the clips: calibrated, or given a range by somebody else.

        An average that was made before the calibration has averaged clips, and no count of batches or a broken one.
        """
        seen = self._seen.read(self.batches_seen)
        return seen >= self.batch_num or ((seen == 0 or not float(seen).is_integer()) and self._has_range())

    @property
    def recordable(self) -> bool:
        """Whether there are clips to record: those of the state, or what an evaluation without any has used."""
        return self.ready or self.evaluated is not None

    @property
    def may_calibrate(self) -> bool:
        """Whether the present forward may calibrate: one of training, or one of `calibrate`.

        A part in eval mode within a model in training mode (a frozen backbone) sees training data, too.
        """
        return self._sees_training_data and not state_updates_disabled()

    @property
    def _sees_training_data(self) -> bool:
        return self.training or self.tracker.calibrating or self.tracker.training

    def forward(self, x: Tensor, used: list[Tensor] | None = None) -> Tensor:
        """Quantise ``x`` for the layer that runs first; keep the result for the layers that share the input.

        ``used`` takes up the result and what it was made of: the input, the effective clips (maximum, minimum).
        """
        made = self._make(x)
        if self.num_readers > 1:
            self.shared.keep(made, x, self.num_readers - 1, self.tracker.forward_id)
        if used is not None:
            used += made
        return made[0]

    def reuse(self, x: Tensor, used: list[Tensor]) -> Tensor:
        """Quantised ``x`` for a further reader: what was made of the same input in this forward, else made here.

        Where the layer that holds the quantiser does not run, the first reader calibrates in its place.
        """
        forward = self.tracker.forward_id
        made = self.shared.take(x, forward)
        if made is None:
            made = self._make(x)
            if forward is not None:
                self.shared.keep(made, x, self.num_readers - 1, forward)
        used += made
        return made[0]

    def _make(self, x: Tensor) -> tuple[Tensor, ...]:
        """Quantised ``x``, ``x``, and the effective clips (maximum, minimum)."""
        clips = self.clips_for(x)
        if not clips.kept or x.numel() == 0 or state_updates_disabled():
            y, _, _, clip_max, clip_min, invalid = self._quantize(x, clips)
            if not clips.kept and not state_updates_disabled():
                self._note_invalid(invalid)
            return y, x, clip_max, clip_min
        y, clip_max, clip_min = ops.ulq_fake_quantize_(
            x, *clips[:4], self.scale, self.offset, self.invalid, self.num_bits, self.fixed_min
        )
        if not torch.compiler.is_compiling():  # a graph must not depend on a count
            self.clip_writes += 1
        if self.validate_now:
            self.raise_if_invalid()
        return y, x, clip_max, clip_min

    def clips_for(self, x: Tensor) -> ClipRange:
        """The clips for ``x``, calibrating on it first where that is due. Errors: InvalidDataError."""
        finished = self.calibrated
        if not finished:
            self.calibrate(x)
            finished = self.calibrated
        own = ClipRange(self.clip_max, self.clip_min, self.prev_clip_max, self.prev_clip_min, kept=True)
        if finished or x.numel() == 0:
            return own
        if not host_can_read(self.clip_max):
            return own if self.may_calibrate else self._range_of(x)
        if self._has_range() if self._sees_training_data else self.ready:
            return own
        self.tracker.warn_uncalibrated(self.layer)
        clips = self._range_of(x)
        self.evaluated = None if self._sees_training_data or state_updates_disabled() else clips
        return clips

    def calibrate(self, x: Tensor) -> None:
        """Take ``x`` as a batch of the calibration, once in a forward of the model and only while training.

        Errors: InvalidDataError.
        """
        if self.calibrated or x.numel() == 0 or x.is_meta or not self.may_calibrate:
            return
        forward = self.tracker.forward_id
        if forward is None or forward != self._calibrated_in:
            self._calibrated_in = forward
            self._calibrate(x.detach())

    def quantize_step(self, state: Tensor, clips: ClipRange, steps: list[tuple[Tensor, ...]]) -> Tensor:
        """Quantise the state of one step of a sequence; ``steps`` gathers what ``end_sequence`` needs."""
        steps.append(self._quantize(state, clips))
        return steps[-1][0]

    def end_sequence(self, clips: ClipRange, steps: list[tuple[Tensor, ...]]) -> None:
        """Write the effective clips back, once per sequence: they are the same at every step, as are those of AMCT."""
        _, scale, offset, clip_max, clip_min, _ = steps[-1]
        invalid = torch.stack([step[5] for step in steps]).any()
        if clips.kept:
            self.write_back(scale, offset, clip_max, clip_min, invalid)
        elif not state_updates_disabled():
            self._note_invalid(invalid)

    @torch.no_grad()
    def write_back(self, scale: Tensor, offset: Tensor, clip_max: Tensor, clip_min: Tensor, invalid: Tensor) -> None:
        """Note what a forward used. Errors: InvalidDataError, where the check is not deferred."""
        if state_updates_disabled():
            return
        torch._foreach_copy_(
            [self.clip_max, self.clip_min, self.prev_clip_max, self.prev_clip_min, self.scale, self.offset],
            [clip_max, clip_min, clip_max, clip_min, scale, offset],
        )
        if not torch.compiler.is_compiling():  # a graph must not depend on a count
            self.clip_writes += 1
        self._note_invalid(invalid)

    @torch.no_grad()
    def current_scale(self) -> Tensor:
        """The scale that the present clips give, on the device."""
        return self._quantize(self.clip_max.new_zeros(0))[1]

    def factors(self) -> tuple[float, int]:
        """scale_d and offset_d of the present clips, on the host; before a calibration of what was last evaluated.

        Errors: InvalidDataError where they give none.
        """
        with torch.no_grad():
            out = self._quantize(self.clip_max.new_zeros(0), None if self.ready else self.evaluated)
        scale, offset = float(out[1]), float(out[2])
        if not (scale > 0 and scale < float("inf")):
            raise InvalidDataError(f"layer '{self.layer}': the activation clips give no valid scale ({scale})")
        return scale, int(offset)

    def raise_if_invalid(self) -> None:
        """Raise InvalidDataError, once, if a forward since the last check met NaN or Inf."""
        if bool(self.invalid):
            self.invalid.zero_()
            raise InvalidDataError(
                f"layer '{self.layer}': its input held NaN or Inf in a forward since the last check; "
                "look at the data, the learning rate and loss scaling, and restore the last good checkpoint"
            )

    def _note_invalid(self, invalid: Tensor) -> None:
        self.invalid.logical_or_(invalid)
        if self.validate_now:
            self.raise_if_invalid()

    def _quantize(self, x: Tensor, clips: ClipRange | None = None) -> tuple[Tensor, ...]:
        bounds = (self.clip_max, self.clip_min, self.prev_clip_max, self.prev_clip_min) if clips is None else clips[:4]
        return ops.ulq_fake_quantize(x, *bounds, self.num_bits, self.fixed_min)

    @torch.no_grad()
    def _has_range(self) -> bool:
        """Whether the clips are a range at all; reads the device, so only asked before the calibration is finished."""
        return bool(self.clip_max - self.clip_min > torch.finfo(torch.float32).eps)

    @torch.no_grad()
    def _range_of(self, x: Tensor) -> ClipRange:
        """The range that a calibration with ``x`` as its next batch would use; nothing is kept.

        Where the host cannot ask, clips that are a range go first; decided on the device.
        """
        last = self._seen.value + 1 >= self.batch_num
        clip_max, clip_min = batch_range(_values(x.detach()), self.num_bits, last)
        if not host_can_read(self.clip_max) and self._seen.value == 0:
            usable = self.clip_max - self.clip_min > torch.finfo(torch.float32).eps
            clip_max = torch.where(usable, self.clip_max, clip_max)
            clip_min = torch.where(usable, self.clip_min, clip_min)
        return ClipRange(clip_max, clip_min, clip_max, clip_min, kept=False)

    @torch.no_grad()
    def _calibrate(self, x: Tensor) -> None:
        self.evaluated = None
        seen = self._seen.read(self.batches_seen)
        if seen != self.calibration.batches:  # what was gathered before a load, or by another model, is not here
            self.calibration.clear()
            seen = 0
        last = seen + 1 >= self.batch_num
        clip_max, clip_min = self.calibration.add(_values(x), self.num_bits, last, self.layer)
        found: list[tuple[Tensor, Tensor]] = [(self.clip_max, clip_max), (self.clip_min, clip_min)]
        if last:
            found += [(self.prev_clip_max, clip_max), (self.prev_clip_min, clip_min)]
        count = torch.full_like(self.batches_seen, seen + 1)
        for own, value in [*found, (self.batches_seen, count)]:
            own.copy_(_unless(self.batches_seen >= self.batch_num, own, value))
        self.found_clips = "final" if last else "provisional"
        self._seen.wrote(self.batches_seen, seen + 1)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Count the calibration as finished, with the clips that are there."""
        self.calibration.clear()
        if not self.calibrated:
            self.batches_seen.fill_(self.batch_num)
            self._seen.wrote(self.batches_seen, self.batch_num)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.evaluated = None
        self.calibration.clear()
        gathered = state_dict.pop(prefix + "calibration_data", None)  # of a checkpoint of version 0.1
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if gathered is not None and gathered.numel() and is_resumable(gathered):
            self.calibration.resume(gathered.to(self.clip_max.device), int(self.batches_seen))
        self._seen.read(self.batches_seen)  # a graph compiled next takes the value as it is now
        self.shared, self.shared_codes = SharedInputCache(), SharedInputCache()

    def extra_repr(self) -> str:
        text = f"num_bits={self.num_bits}, fixed_min={self.fixed_min}, batch_num={self.batch_num}"
        return text + (f", readers={self.num_readers}" if self.num_readers > 1 else "")


def _unless(done: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """``other``, or in a compiled graph ``own`` where ``done``: values may have been copied in before it was traced."""
    return torch.where(done, own, other) if torch.compiler.is_compiling() else other


def _values(x: Tensor) -> Tensor:
    """The values of an activation as the range searches take them."""
    data = x.flatten()
    return data if data.dtype == torch.float64 else data.float()
