"""The quantiser of an activation: fake quantisation with learned clips (ULQ)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.config.text import DataQuant
from amct_ext.errors import InvalidDataError
from amct_ext.layers.activation.calibration import CalibratedClips
from amct_ext.layers.activation.shared_input import SharedInputCache
from amct_ext.layers.activation.types import FakeQuantized, ForwardClips, QuantizedActivation
from amct_ext.layers.forward_context import state_updates_disabled


class ActivationQuantizer(CalibratedClips):
    """Fake quantisation of an activation with learned clips (ULQ), which a calibration has found.

    Parameters: ``clip_max``, ``clip_min`` (0-dim). Buffers, 0-dim: ``prev_clip_max``, ``prev_clip_min``, ``scale``,
    ``offset`` (of the last forward), ``invalid`` (sticky: NaN/Inf was seen), ``batches_seen`` (a float, so that an
    average of the model carries it too). Every forward writes the effective clips back to the parameters, as AMCT does.
    Source: AMCT's activation ULQ.
    """

    def __init__(self, plan: DataQuant, fixed_min: bool, batch_num: int, layer: str, device: torch.device) -> None:
        super().__init__(plan, fixed_min, batch_num, layer, device)
        self.validate_now = False
        self.stash = True
        self.bypassed = False  # the input goes through as it is
        self.num_readers = 1
        self.shared: SharedInputCache[FakeQuantized] = SharedInputCache()
        self.shared_codes: SharedInputCache[QuantizedActivation] = SharedInputCache()
        self.clip_writes = 0  # by forwards; versions of the clips that count as no change

    def forward(self, x: Tensor, results: list[FakeQuantized] | None = None) -> Tensor:
        """Quantise ``x`` for the layer that runs first; keep the result for the layers that share the input.

        Appends to ``results`` what it computed; hooks at the quantiser may replace the tensor returned.
        """
        result = self._fake_quantize(x)
        if self.num_readers > 1:
            self.shared.put(result, x, self.num_readers - 1, self.tracker.forward_id)
        if results is not None:
            results.append(result)
        return result.y

    def forward_shared(self, x: Tensor, results: list[FakeQuantized]) -> Tensor:
        """Quantised ``x`` for a further reader: the kept result for the same input in this forward, else a new one.

        Where the layer that holds the quantiser does not run, the first reader calibrates in its place.
        """
        forward = self.tracker.forward_id
        result = self.shared.take(x, forward)
        if result is None:
            result = self._fake_quantize(x)
            if forward is not None:
                self.shared.put(result, x, self.num_readers - 1, forward)
        results.append(result)
        return result.y

    def _fake_quantize(self, x: Tensor) -> FakeQuantized:
        if self.bypassed:
            return FakeQuantized(x, x, self.clip_max, self.clip_min)
        clips = self.clips_for(x)
        if not clips.is_state or x.numel() == 0 or state_updates_disabled():
            y, _, _, clip_max, clip_min, invalid = self._quantize(x, clips)
            if not clips.is_state and not state_updates_disabled():
                self._note_invalid(invalid)
            return FakeQuantized(y, x, clip_max, clip_min)
        y, clip_max, clip_min = ops.ulq_fake_quantize_(
            x, *clips[:4], self.scale, self.offset, self.invalid, self.num_bits, self.fixed_min
        )
        if not torch.compiler.is_compiling():  # a graph must not depend on a count
            self.clip_writes += 1
        if self.validate_now:
            self.raise_if_invalid()
        return FakeQuantized(y, x, clip_max, clip_min)

    def quantize_step(self, state: Tensor, clips: ForwardClips, steps: list[tuple[Tensor, ...]]) -> Tensor:
        """Quantise the state of one step of a sequence; ``steps`` collects what ``end_sequence`` needs."""
        steps.append(self._quantize(state, clips))
        return state if self.bypassed else steps[-1][0]

    def end_sequence(self, clips: ForwardClips, steps: list[tuple[Tensor, ...]]) -> None:
        """Write the effective clips back, once per sequence: they are the same at every step, as are those of AMCT."""
        _, scale, offset, clip_max, clip_min, _ = steps[-1]
        invalid = torch.stack([step[5] for step in steps]).any()
        if clips.is_state:
            self.write_back(scale, offset, clip_max, clip_min, invalid)
        elif not state_updates_disabled():
            self._note_invalid(invalid)

    @torch.no_grad()
    def write_back(self, scale: Tensor, offset: Tensor, clip_max: Tensor, clip_min: Tensor, invalid: Tensor) -> None:
        """Write what a forward used to the state. Errors: InvalidDataError, where the check is not deferred."""
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
        """The scale that the current clips give, on the device."""
        return self._quantize(self.clip_max.new_zeros(0))[1]

    def factors(self) -> tuple[float, int]:
        """scale_d and offset_d of the current clips, on the host; before a calibration those last evaluated with.

        Errors: InvalidDataError where the clips give no scale.
        """
        with torch.no_grad():
            out = self._quantize(self.clip_max.new_zeros(0), None if self.ready else self.uncalibrated_range)
        scale, offset = float(out[1]), float(out[2])
        if not (scale > 0 and scale < float("inf")):
            raise InvalidDataError(f"layer '{self.layer}': the activation clips give no valid scale ({scale})")
        return scale, int(offset)

    def raise_if_invalid(self) -> None:
        """Raise InvalidDataError, once, if a forward since the last check met NaN or Inf."""
        raise_if_invalid((self,))

    def _note_invalid(self, invalid: Tensor) -> None:
        self.invalid.logical_or_(invalid)
        if self.validate_now:
            self.raise_if_invalid()

    def _quantize(self, x: Tensor, clips: ForwardClips | None = None) -> tuple[Tensor, ...]:
        bounds = (self.clip_max, self.clip_min, self.prev_clip_max, self.prev_clip_min) if clips is None else clips[:4]
        return ops.ulq_fake_quantize(x, *bounds, self.num_bits, self.fixed_min)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.shared, self.shared_codes = SharedInputCache(), SharedInputCache()

    def extra_repr(self) -> str:
        text = f"num_bits={self.num_bits}, fixed_min={self.fixed_min}, batch_num={self.batch_num}"
        return text + (f", readers={self.num_readers}" if self.num_readers > 1 else "")


def raise_if_invalid(quantizers: Sequence[ActivationQuantizer]) -> None:
    """Raise InvalidDataError, once for all, if a forward since the last check met NaN or Inf."""
    layers = [quantizer.layer for quantizer in quantizers if bool(quantizer.invalid)]
    if layers:
        for quantizer in quantizers:
            quantizer.invalid.zero_()
        others = f" (and {len(layers) - 1} more: {', '.join(layers[1:9])})" if len(layers) > 1 else ""
        raise InvalidDataError(
            f"layer '{layers[0]}'{others}: its input held NaN or Inf in a forward since the last check; "
            "look at the data, the learning rate and loss scaling, and restore the last good checkpoint"
        )
