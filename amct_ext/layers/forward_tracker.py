"""Which forward of a whole model is under way on the present thread."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from types import FrameType

import torch

from amct_ext.layers.forward_context import in_backward

logger = logging.getLogger("amct_ext")


class ForwardTracker:
    """Numbers the forwards of a whole model; results are deferred and inputs shared only within one.

    A forward is under way while the frame that began it is on the stack of the current thread. A counter that hooks
    raise and lower would be wrong after a KeyboardInterrupt, for which torch calls no hook. Copies and pickles start
    with no forward under way.
    """

    def __init__(self, first: int = 1) -> None:
        self.calibrating = False  # `calibrate` runs: forwards in eval mode calibrate, too
        self.warned = False
        self._last_training = False
        self._numbers = itertools.count(first)
        self._local = threading.local()

    def enter(self, frame: FrameType, training: bool = False) -> None:
        """Note that ``frame`` runs the model, in training mode or not; a nested forward belongs to the outer one."""
        outer = self._current()
        number, training = (next(self._numbers), training) if outer is None else outer[1:]
        self._last_training = training
        self._entries().append((frame, number, training))

    def exit(self, frame: FrameType) -> None:
        """Note that the forward of ``frame``, or of a frame that it called, has ended."""
        entries = self._entries()
        while entries and (entries[-1][0] is frame or not _on_stack(entries[-1][0])):
            entries.pop()

    @property
    def forward_id(self) -> int | None:
        """Which forward of the model is under way here; None where there is none, or in a compiled graph."""
        current = self._current()
        return None if current is None else current[1]

    @property
    def training(self) -> bool:
        """Whether a training forward of the model is under way here, in which parts of it may be in eval mode.

        A part that gradient checkpointing runs again belongs to the last forward.
        """
        current = self._current()
        if current is None:
            return self._last_training and not torch.compiler.is_compiling() and in_backward()
        return current[2]

    def warn_uncalibrated(self, layer: str) -> None:
        """Log, once for a model, that it is evaluated before its calibration."""
        if not self.warned:
            self.warned = True
            logger.warning(
                "layer '%s' and maybe others are evaluated before their activation ranges were calibrated: each input "
                "is quantised by a range of its own and nothing is kept. Forwards in training mode calibrate; "
                "amct_ext.calibrate(model, batches) does so without training",
                layer,
            )

    def _current(self) -> tuple[FrameType, int, bool] | None:
        if torch.compiler.is_compiling():
            return None
        entries = self._entries()
        while entries and not _on_stack(entries[-1][0]):
            entries.pop()
        return entries[-1] if entries else None

    def _entries(self) -> list[tuple[FrameType, int, bool]]:
        try:
            found: list[tuple[FrameType, int, bool]] = self._local.entries
        except AttributeError:
            found = self._local.entries = []
        return found

    def __reduce__(self) -> tuple[type[ForwardTracker], tuple[int]]:
        return ForwardTracker, (next(self._numbers) + 1,)  # numbers of a copy are never those of earlier forwards


def _on_stack(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None
