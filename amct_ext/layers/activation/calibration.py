"""The state of an activation quantiser, and the calibration that finds its first clips."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from amct_ext.common.ranks import is_distributed
from amct_ext.config.text import DataQuant
from amct_ext.layers.activation.calibration_data import CalibrationData, ValueStatistics, is_resumable
from amct_ext.layers.activation.range_search import ClipPair, FoundRange, RangeSearch
from amct_ext.layers.activation.types import ForwardClips
from amct_ext.layers.cached_item import CachedItem
from amct_ext.layers.forward_context import host_can_read, state_updates_disabled
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.precision import KeepsPrecision

_NAN = float("nan")
_EPS = torch.finfo(torch.float32).eps
logger = logging.getLogger("amct_ext")


class CalibratedClips(KeepsPrecision):
    """Clips of an activation: configured, or found by a range search (IFMR) in the first training forwards.

    Without configured clips the first ``batch_num`` training forwards calibrate: each but the last uses the range of
    its own batch, the last one searches the clips on the data of all batches. An evaluation before that uses a range of
    its own input and changes no state. The data of a calibration under way are in no state dict: a load restarts it.
    The state is documented at `ActivationQuantizer`. Source: AMCT's IFMR.
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
        self.search = RangeSearch.of(plan, fixed_min)
        self.batch_num = 0 if plan.clip_max is not None else batch_num
        # Equal clips mean "not set". An average over floating-point entries alone, made before the calibration, keeps
        # them equal.
        start_max = 1.0 if plan.clip_max is None else plan.clip_max
        start_min = 1.0 if plan.clip_min is None else plan.clip_min
        self.clip_max = nn.Parameter(torch.tensor(start_max, dtype=torch.float32, device=device))
        self.clip_min = nn.Parameter(torch.tensor(start_min, dtype=torch.float32, device=device))
        for name in ("prev_clip_max", "prev_clip_min", "scale", "offset"):
            self.register_buffer(name, torch.tensor(_NAN, dtype=torch.float32, device=device))
        self.register_buffer("invalid", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.float32, device=device))
        self.calibration = CalibrationData()
        self.uncalibrated_range: ForwardClips | None = None  # of the last evaluation before the calibration; not state
        self.tracker = ForwardTracker()
        self.search_stage: Literal["", "provisional", "final"] = ""  # by the last forward, on this rank's data alone
        self.found_range: FoundRange | None = None  # with it, until it was shared and logged
        self.candidates: tuple[ClipPair, ...] = ()  # for range_search: OUTPUT, until it has chosen
        self.range_decided = self.search.method != "OUTPUT"
        self.every_call_calibrates = False  # of a layer that runs several times: each call counts as a batch
        self._seen = CachedItem(0, stable_from=self.batch_num)
        self._calibrated_in: int | None = None  # forward of the model

    @property
    def calibrated(self) -> bool:
        """Whether the calibration is finished."""
        return self._seen.read(self.batches_seen) >= self.batch_num

    @property
    def took_batch(self) -> bool:
        """Whether the forward of the model that is under way gave the calibration a batch."""
        forward = self.tracker.forward_id
        return forward is not None and forward == self._calibrated_in

    @property
    def ready(self) -> bool:
        """Whether an evaluation can use the clips: calibrated here, or set from elsewhere.

        An average of models made before the calibration has averaged clips, and a count of batches that is 0 or not a
        whole number.
        """
        seen = self._seen.read(self.batches_seen)
        return seen >= self.batch_num or ((seen == 0 or not float(seen).is_integer()) and self._clips_are_set())

    @property
    def recordable(self) -> bool:
        """Whether there are clips to record: those of the state, or those of an evaluation before the calibration."""
        return self.ready or self.uncalibrated_range is not None

    @property
    def may_calibrate(self) -> bool:
        """Whether the current forward may calibrate: one of training, or one of `calibrate`.

        A part in eval mode within a model in training mode (a frozen backbone) sees training data, too.
        """
        return self._sees_training_data and not state_updates_disabled()

    @property
    def _sees_training_data(self) -> bool:
        return self.training or self.tracker.calibrating or self.tracker.training

    def clips_for(self, x: Tensor) -> ForwardClips:
        """The clips for ``x``, calibrating on it first where that is due. Errors: InvalidDataError."""
        finished = self.calibrated
        if not finished:
            self.calibrate(x)
            finished = self.calibrated
        own = ForwardClips(self.clip_max, self.clip_min, self.prev_clip_max, self.prev_clip_min, is_state=True)
        if finished or x.numel() == 0:
            return own
        if not host_can_read(self.clip_max):
            return own if self.may_calibrate else self._range_of(x)
        if self._clips_are_set() if self._sees_training_data else self.ready:
            return own
        self.tracker.warn_uncalibrated(self.layer)
        clips = self._range_of(x)
        self.uncalibrated_range = None if self._sees_training_data or state_updates_disabled() else clips
        return clips

    def calibrate(self, x: Tensor) -> None:
        """Take ``x`` as a batch of the calibration, while training and once in a forward (`every_call_calibrates`).

        Errors: InvalidDataError.
        """
        if self.calibrated or x.numel() == 0 or x.is_meta or not self.may_calibrate:
            return
        forward = self.tracker.forward_id
        if forward is None or forward != self._calibrated_in or self.every_call_calibrates:
            self._calibrated_in = forward
            self._calibrate(x.detach())

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Count the calibration as finished, with the current clips."""
        self.calibration.clear()
        if not self.calibrated:
            self.batches_seen.fill_(self.batch_num)
            self._seen.update(self.batches_seen, self.batch_num)

    @torch.no_grad()
    def set_range(self, clips: ClipPair) -> None:
        """Take other clips for those that the calibration found."""
        self.clip_max.copy_(clips.high)
        self.clip_min.copy_(clips.low)
        self.prev_clip_max.copy_(clips.high)
        self.prev_clip_min.copy_(clips.low)

    def log_range(self) -> None:
        """Log, once after a calibration, that a robust range took the place of AMCT's, or no output was compared."""
        if self.candidates:  # of a compiled graph, which cannot run again
            self.candidates = ()
            logger.warning(
                "layer '%s': range_search: OUTPUT takes a calibration outside of compiled graphs; the range of least "
                "absolute error stays", self.layer,
            )  # fmt: skip
        found, self.found_range = self.found_range, None
        if found is None or found.amct is None or found.replaced is None or not bool(found.replaced):
            return
        logger.warning(
            "layer '%s': AMCT's range %s would put more than half of the non-zero values of an activation into the "
            "code of zero, because of a few large ones; a range that these do not decide, %s, is used. "
            "range_search: AMCT in ulq_quantize keeps AMCT's",
            self.layer, found.amct.text(), found.clips.text(),
        )  # fmt: skip

    @torch.no_grad()
    def _clips_are_set(self) -> bool:
        """Whether the clips are a range at all; reads the device, so only asked before the calibration is finished."""
        return bool(self.clip_max - self.clip_min > _EPS)

    @torch.no_grad()
    def _range_of(self, x: Tensor) -> ForwardClips:
        """The range that a calibration with ``x`` as its next batch would use; changes no state.

        Where the host cannot read the clips, the device decides: clips that are set take precedence.
        """
        last = self._seen.value + 1 >= self.batch_num
        clip_max, clip_min = self.search.find(ValueStatistics(_flat_values(x.detach())), last).clips
        if not host_can_read(self.clip_max) and self._seen.value == 0:
            usable = self.clip_max - self.clip_min > _EPS
            clip_max = torch.where(usable, self.clip_max, clip_max)
            clip_min = torch.where(usable, self.clip_min, clip_min)
        return ForwardClips(clip_max, clip_min, clip_max, clip_min, is_state=False)

    @torch.no_grad()
    def _calibrate(self, x: Tensor) -> None:
        self.uncalibrated_range = None
        seen = self._seen.read(self.batches_seen)
        if seen != self.calibration.batches:  # the counter was loaded or copied; the data of those batches are not here
            self.calibration.clear()
            seen = 0
        last = seen + 1 >= self.batch_num
        result = self.calibration.add(_flat_values(x), self.search, last, self.layer)
        clip_max, clip_min = result.clips
        found: list[tuple[Tensor, Tensor]] = [(self.clip_max, clip_max), (self.clip_min, clip_min)]
        if last:
            found += [(self.prev_clip_max, clip_max), (self.prev_clip_min, clip_min)]
        count = torch.full_like(self.batches_seen, seen + 1)
        for own, value in [*found, (self.batches_seen, count)]:
            own.copy_(_unless(self.batches_seen >= self.batch_num, own, value))
        self.search_stage = "final" if last else "provisional"
        self.found_range = result if last else None
        self.candidates = result.candidates if last else ()
        if not (is_distributed() or torch.compiler.is_compiling() or self.candidates):
            self.log_range()
        self._seen.update(self.batches_seen, seen + 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.uncalibrated_range = None
        self.calibration.clear()
        self.candidates, self.range_decided = (), self.search.method != "OUTPUT"
        data = state_dict.pop(prefix + "calibration_data", None)  # of a checkpoint of version 0.1
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if data is not None and data.numel() and is_resumable(data):
            self.calibration.resume(data.to(self.clip_max.device), int(self.batches_seen))
        self._seen.read(self.batches_seen)  # the next compiled graph takes the value as it is now


def _unless(done: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """``other``, or in a compiled graph ``own`` where ``done``: values may have been copied in before it was traced."""
    return torch.where(done, own, other) if torch.compiler.is_compiling() else other


def _flat_values(x: Tensor) -> Tensor:
    """The values of an activation as the range searches take them: one dimension, float32 or float64."""
    data = x.flatten()
    return data if data.dtype == torch.float64 else data.float()
