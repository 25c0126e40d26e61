"""Which way is faster for a layer: both are run and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.layers.integer_autograd import QuantizedActivation, integer_product

_FEWEST, _MOST = 3, 12  # rounds


def integers_are_faster(layer: Any, x: Tensor, with_gradients: bool, with_norm: bool) -> bool:
    """Whether integers are faster: both ways are run on ``x``, in turns; nothing of the layer changes.

    ``with_norm``: on integers, the BatchNorm that follows costs nothing.
    """
    quantizer = layer.activation
    clips = (quantizer.clip_max, quantizer.clip_min, quantizer.prev_clip_max, quantizer.prev_clip_min)
    options = (quantizer.num_bits, quantizer.fixed_min)
    bits = layer.weight_quant.num_bits
    with torch.no_grad():
        scale = layer.weight_quant.current_scale(layer.masked_weight())
        weight = ops.lsq_fake_quantize(layer.masked_weight(), scale, bits, 0 if scale.numel() > 1 else None)
        packed = ops.pack_weight(weight, scale, bits)

        def on_floats() -> None:
            y = layer._compute(ops.ulq_fake_quantize(x, *clips, *options)[0], weight)
            if with_norm:
                layer.apply_batch_norm(y)

        def on_integers() -> None:
            codes, *rest = ops.ulq_quantize(x, *clips, *options)
            made = QuantizedActivation(x, x, rest[2], rest[3], codes, rest[0], rest[1], bits)
            again = ops.pack_weight(weight, scale, bits) if with_gradients else packed
            integer_product(layer, made, x, *again, scale)
            if with_gradients and layer.weight.requires_grad and not quantizer.stash:
                ops.ulq_fake_quantize(x, *clips, *options)  # what backward does once more

        floats: list[float] = []
        integers: list[float] = []
        while len(floats) < _FEWEST or (len(floats) < _MOST and not (_settled(floats) and _settled(integers))):
            floats.append(_seconds(on_floats))
            integers.append(_seconds(on_integers))
    return min(integers) < min(floats)


def _settled(times: list[float]) -> bool:
    """Whether the two shortest agree within a tenth: what else runs on the machine only ever adds."""
    first, second = sorted(times)[:2]
    return second <= 1.1 * first


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
