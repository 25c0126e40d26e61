"""Which product is faster for a layer, on floats or on integers: both are run and timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.layers.activation_types import QuantizedActivation
from amct_ext.layers.bn_fold import apply_batch_norm
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.integer_ops import PackedWeight, integer_product

_MIN_ROUNDS, _MAX_ROUNDS = 3, 12


def integers_are_faster(layer: CompressedLayer, x: Tensor, with_gradients: bool, with_norm: bool) -> bool:
    """Whether integers are faster: both are run on ``x``, in turns; the layer's state does not change.

    ``with_norm``: count the BatchNorm that follows for the float side; on integers it is fused.
    """
    quantizer, weight_quant, norm = layer.activation, layer.weight_quant, layer.refs.batch_norm
    assert quantizer is not None and weight_quant is not None
    clips = (quantizer.clip_max, quantizer.clip_min, quantizer.prev_clip_max, quantizer.prev_clip_min)
    num_bits, fixed_min, stash = quantizer.num_bits, quantizer.fixed_min, quantizer.stash
    bits = weight_quant.num_bits
    with torch.no_grad():
        scale = weight_quant.current_scale(layer.masked_weight())
        weight = ops.lsq_fake_quantize(layer.masked_weight(), scale, bits, 0 if scale.numel() > 1 else None)
        packed = ops.pack_weight(weight, scale, bits)

        def on_floats() -> None:
            y = layer.compute_with_weight(ops.ulq_fake_quantize(x, *clips, num_bits, fixed_min)[0], weight)
            if with_norm and norm is not None:
                apply_batch_norm(y, norm)

        def on_integers() -> None:
            codes, x_scale, x_offset, clip_max, clip_min, _ = ops.ulq_quantize(x, *clips, num_bits, fixed_min)
            act = QuantizedActivation(x, x, clip_max, clip_min, codes, x_scale, x_offset, bits)
            again = ops.pack_weight(weight, scale, bits) if with_gradients else packed
            integer_product(layer, act, x, PackedWeight(*again, scale))
            if with_gradients and layer.weight.requires_grad and not stash:
                ops.ulq_fake_quantize(x, *clips, num_bits, fixed_min)  # backward computes it once more

        floats: list[float] = []
        integers: list[float] = []
        while len(floats) < _MIN_ROUNDS or (
            len(floats) < _MAX_ROUNDS and not (_is_stable(floats) and _is_stable(integers))
        ):
            floats.append(_seconds(on_floats))
            integers.append(_seconds(on_integers))
    return min(integers) < min(floats)


def _is_stable(times: list[float]) -> bool:
    """Whether the two shortest agree within a tenth; other load on the machine only ever adds time."""
    first, second = sorted(times)[:2]
    return second <= 1.1 * first


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
