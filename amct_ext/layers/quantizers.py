"""The quantisers of one layer: activation (learned clips) and weight (adaptive range or learned scale)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.config.plan import DataQuant, WeightQuant
from amct_ext.errors import InvalidDataError
from amct_ext.layers.gathering import Gathering, Values, fits, take_batch
from amct_ext.layers.precision import KeepsPrecision
from amct_ext.layers.product import Codes
from amct_ext.layers.sharing import Shared

_NAN = float("nan")


class ActivationQuantizer(KeepsPrecision):
    """Fake quantisation of an activation with learned clips (ULQ), started by a range search (IFMR).

    Without configured clips the first ``batch_num`` forwards calibrate: each but the last uses the range of its own
    batch, the last one searches the clips on all data gathered. Parameters: ``clip_max``, ``clip_min`` (0-dim).
    Buffers: ``prev_clip_max``, ``prev_clip_min``, ``scale``, ``offset`` (of the last forward), ``invalid`` (sticky:
    NaN/Inf was seen), ``batches_seen``, ``calibration_data`` (empty outside a calibration of several batches; values
    or a histogram, as ``gathering`` says). The effective clips are written back to the parameters by every forward, as
    AMCT does. Source: AMCT's activation ULQ and IFMR.
    """

    clip_max: nn.Parameter
    clip_min: nn.Parameter
    prev_clip_max: Tensor
    prev_clip_min: Tensor
    scale: Tensor
    offset: Tensor
    invalid: Tensor
    batches_seen: Tensor
    calibration_data: Tensor

    def __init__(self, plan: DataQuant, fixed_min: bool, batch_num: int, layer: str, device: torch.device) -> None:
        super().__init__()
        self.layer = layer
        self.num_bits = plan.num_bits
        self.fixed_min = fixed_min
        self.batch_num = 0 if plan.clip_max is not None else batch_num
        start_max = 1.0 if plan.clip_max is None else plan.clip_max
        start_min = 1.0 if plan.clip_min is None else plan.clip_min
        self.clip_max = nn.Parameter(torch.tensor(start_max, device=device))
        self.clip_min = nn.Parameter(torch.tensor(start_min, device=device))
        for name in ("prev_clip_max", "prev_clip_min", "scale", "offset"):
            self.register_buffer(name, torch.tensor(_NAN, device=device))
        self.register_buffer("invalid", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("calibration_data", torch.zeros(0, device=device))
        self.validate_now = False
        self.stash = True
        self.gathering: Gathering = Values()
        self.num_readers = 1
        self.shared: Shared[tuple[Tensor, ...]] = Shared()
        self.shared_codes: Shared[Codes] = Shared()
        # Host mirror of batches_seen: the branch must not read a tensor.
        self._seen = 0
        self._own_range = False

    @property
    def calibrated(self) -> bool:
        return self._seen >= self.batch_num

    def forward(self, x: Tensor, used: list[Tensor] | None = None) -> Tensor:
        """Quantise ``x`` for the layer that runs first; keep the result for the layers that share the input.

        ``used`` takes up the result and what it was made of: the input, the effective clips (maximum, minimum).
        """
        self.calibrate(x)
        y, clip_max, clip_min = ops.ulq_fake_quantize_(
            x,
            self.clip_max,
            self.clip_min,
            self.prev_clip_max,
            self.prev_clip_min,
            self.scale,
            self.offset,
            self.invalid,
            self.num_bits,
            self.fixed_min,
        )
        if self.validate_now:
            self.raise_if_invalid()
        made = (y, x, clip_max, clip_min)
        self.shared.keep(made, x, self.num_readers - 1)
        if used is not None:
            used += made
        return y

    def calibrate(self, x: Tensor) -> None:
        """Take ``x`` as a batch of the calibration; does nothing once that is finished. Errors: InvalidDataError."""
        if not self.calibrated:
            self._calibrate(x.detach())

    def quantize_step(self, state: Tensor, steps: list[tuple[Tensor, ...]]) -> Tensor:
        """Quantise the state of one step of a sequence; ``steps`` gathers what ``end_sequence`` needs."""
        steps.append(self._quantize(state))
        return steps[-1][0]

    def end_sequence(self, steps: list[tuple[Tensor, ...]]) -> None:
        """Write the effective clips back, once per sequence: they are the same at every step, as are those of AMCT."""
        _, scale, offset, clip_max, clip_min, _ = steps[-1]
        self.write_back(scale, offset, clip_max, clip_min, torch.stack([step[5] for step in steps]).any())

    @torch.no_grad()
    def write_back(self, scale: Tensor, offset: Tensor, clip_max: Tensor, clip_min: Tensor, invalid: Tensor) -> None:
        """Note what a forward used. Errors: InvalidDataError, where the check is not deferred."""
        torch._foreach_copy_(
            [self.clip_max, self.clip_min, self.prev_clip_max, self.prev_clip_min, self.scale, self.offset],
            [clip_max, clip_min, clip_max, clip_min, scale, offset],
        )
        self.invalid.logical_or_(invalid)
        if self.validate_now:
            self.raise_if_invalid()

    def reuse(self, x: Tensor, used: list[Tensor]) -> Tensor:
        """Quantised ``x`` for a further reader: what ``forward`` made of the same input, else made anew."""
        made = self.shared.take(x)
        if made is None:
            y, _, _, clip_max, clip_min, _ = self._quantize(x)
            made = (y, x, clip_max, clip_min)
        used += made
        return made[0]

    @torch.no_grad()
    def present_scale(self) -> Tensor:
        """The scale that the present clips give, on the device."""
        return self._quantize(self.clip_max.new_zeros(0))[1]

    def factors(self) -> tuple[float, int]:
        """scale_d and offset_d of the present clips, on the host. Errors: InvalidDataError where they give none."""
        with torch.no_grad():
            out = self._quantize(self.clip_max.new_zeros(0))
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

    def _quantize(self, x: Tensor) -> tuple[Tensor, ...]:
        return ops.ulq_fake_quantize(
            x, self.clip_max, self.clip_min, self.prev_clip_max, self.prev_clip_min, self.num_bits, self.fixed_min
        )

    @torch.no_grad()
    def _calibrate(self, x: Tensor) -> None:
        data = x.flatten()
        data = data if data.dtype == torch.float64 else data.float()
        last = self._seen + 1 >= self.batch_num
        gathered, clip_max, clip_min = take_batch(self.gathering, self.calibration_data, data, self.num_bits, last)
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(clip_max) & torch.isfinite(clip_min)):
            raise InvalidDataError(f"layer '{self.layer}': its input holds NaN or Inf, no clip range can be found")
        self.calibration_data = gathered
        self.clip_max.copy_(clip_max)
        self.clip_min.copy_(clip_min)
        if last:
            self.prev_clip_max.copy_(clip_max)
            self.prev_clip_min.copy_(clip_min)
        self._seen += 1
        self._own_range = True
        self.batches_seen.add_(1)

    def found_range(self) -> list[Tensor]:
        """The clips that the last forward found on this rank's data alone, once; nothing where it found none."""
        if not self._own_range:
            return []
        self._own_range = False
        clips = [self.clip_max.detach(), self.clip_min.detach()]
        return clips + ([self.prev_clip_max, self.prev_clip_min] if self.calibrated else [])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        data = state_dict.get(prefix + "calibration_data")
        own = self.calibration_data
        if isinstance(data, Tensor) and fits(data) and (data.shape, data.dtype) != (own.shape, own.dtype):
            self.calibration_data = torch.zeros_like(data, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._seen = int(self.batches_seen)
        self.shared, self.shared_codes = Shared(), Shared()

    def extra_repr(self) -> str:
        text = f"num_bits={self.num_bits}, fixed_min={self.fixed_min}, batch_num={self.batch_num}"
        return text + (f", readers={self.num_readers}" if self.num_readers > 1 else "")


class WeightQuantizer(KeepsPrecision):
    """Fake quantisation of a weight: range of the present weight (ARQ) or a learned scale (weight ULQ).

    ``scale`` (length 1, or one per output channel) is a buffer for ARQ, renewed by every forward (NaN before the
    first), and a Parameter for learned scales, set from the weight's range by the first forward. Sources: AMCT's ARQ
    and weight ULQ; Esser et al. 2020 (learned step size).
    """

    scale: Tensor
    initialised: Tensor  # learned scales only

    def __init__(self, plan: WeightQuant, weight: Tensor, channel_axis: int, grad_factor: float) -> None:
        super().__init__()
        self.num_bits = plan.num_bits
        self.channel_axis = channel_axis if plan.channel_wise else None
        self.learned = plan.algo == "ulq_retrain"
        self.grad_factor = grad_factor
        start = ops.arq_fake_quantize(weight.detach(), self.num_bits, self.channel_axis)[1]
        self._initialised = False
        if self.learned:
            self.scale = nn.Parameter(start.clone())
            self.register_buffer("initialised", torch.zeros((), dtype=torch.bool, device=weight.device))
        else:
            self.register_buffer("scale", torch.full_like(start, _NAN))

    def forward(self, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the fake-quantised weight (same shape, dtype and layout), masked first where a mask is given."""
        if not self.learned:
            if mask is None:
                y, scale = ops.arq_fake_quantize(weight, self.num_bits, self.channel_axis)
            else:
                y, scale = ops.sparse_arq_fake_quantize(weight, mask, self.num_bits, self.channel_axis)
            with torch.no_grad():
                self.scale.copy_(scale)
            return y
        if mask is not None:
            weight = ops.apply_mask(weight, mask)
        if not self._initialised:
            self._initialise(weight.detach())
        return ops.lsq_fake_quantize(weight, self.scale, self.num_bits, self.channel_axis, self.grad_factor)

    @torch.no_grad()
    def used_scale(self) -> Tensor:
        """The scale that the last forward used; nothing is computed from a weight."""
        return self.scale.detach().clamp_min(torch.finfo(torch.float32).eps) if self.learned else self.scale

    @torch.no_grad()
    def present_scale(self, weight: Tensor) -> Tensor:
        """The scale that a forward on ``weight`` would use now; nothing is changed."""
        if self.learned and self._initialised:
            return self.used_scale()
        return ops.arq_fake_quantize(weight.detach(), self.num_bits, self.channel_axis)[1]

    @torch.no_grad()
    def _initialise(self, weight: Tensor) -> None:
        self.scale.copy_(ops.arq_fake_quantize(weight, self.num_bits, self.channel_axis)[1])
        self.initialised.fill_(True)
        self._initialised = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.learned:
            self._initialised = bool(self.initialised)

    def extra_repr(self) -> str:
        algo = "learned scale" if self.learned else "ARQ"
        return f"{algo}, num_bits={self.num_bits}, channel_axis={self.channel_axis}"
