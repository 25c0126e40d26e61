"""Which product is fastest for a layer, on floats, on integers or on prepared floats: all are run and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.activation.types import QuantizedActivation
from amct_ext.layers.bn_fold import apply_batch_norm
from amct_ext.layers.chains.chain_values import pending_chain
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.lazy_tensor import LazyTensor
from amct_ext.layers.product_path import ProductPath
from amct_ext.layers.products.integer_ops import PackedWeight, conv_geometry, integer_product
from amct_ext.layers.products.prepared_ops import IDENTITY, conv2d, linear, pack_conv_weight, pack_linear_weight

_MIN_ROUNDS, _MAX_ROUNDS = 3, 12
_MARGIN = 0.9  # a layer on floats among others must gain more than this: its input and its output change their layout


def fastest(
    layer: CompressedLayer, x: Tensor, paths: Sequence[ProductPath], with_gradients: bool, deferred: bool
) -> ProductPath:
    """The fastest of ``paths`` ("integer", "prepared") and "float".

    They are run on ``x``, in turns; the layer's state does not change. ``deferred``: on floats the BatchNorm and the
    activation function that follow count; on the others they are fused. Each path has ``x`` in the layout that a layer
    before it would have written on the same path: a change of layout between two paths would keep layers from changing.
    """
    with torch.no_grad():
        trial = _Trial(layer, x, with_gradients, deferred)
        runs = {"float": trial.on_floats, "integer": trial.on_integers, "prepared": trial.on_prepared_floats}
        all_paths: tuple[ProductPath, ...] = ("float", *paths)
        times: dict[ProductPath, list[float]] = {path: [] for path in all_paths}
        for turn in range(_MAX_ROUNDS):
            for path, measured in times.items():
                measured.append(_seconds(runs[path]))
            if turn + 1 >= _MIN_ROUNDS and all(map(_is_stable, times.values())):
                break
    shortest = {path: min(measured) for path, measured in times.items()}
    if deferred:
        shortest["float"] /= _MARGIN
    return min(shortest, key=shortest.__getitem__)


class _Trial:
    """One layer's product, input quantisation included, on every path."""

    def __init__(self, layer: CompressedLayer, x: Tensor, with_gradients: bool, deferred: bool) -> None:
        quantizer, weight_quant = layer.input_quantizer, layer.weight_quant
        assert quantizer is not None and weight_quant is not None
        self.layer = layer
        self.with_gradients = with_gradients
        self.deferred = deferred
        self.clips = (quantizer.clip_max, quantizer.clip_min, quantizer.prev_clip_max, quantizer.prev_clip_min)
        self.num_bits, self.fixed_min, self.stash = quantizer.num_bits, quantizer.fixed_min, quantizer.stash
        self.weight_bits = weight_quant.num_bits
        self.scale = weight_quant.current_scale(layer.masked_weight())
        per_channel = 0 if self.scale.numel() > 1 else None
        self.weight = ops.lsq_fake_quantize(layer.masked_weight(), self.scale, self.weight_bits, per_channel)
        self.packed: tuple[Tensor, Tensor] | None = None
        self.prepared: Tensor | None = None
        # On floats the quantiser takes such an input from the convolution before, with BatchNorm in the same pass.
        self.input_is_chain = with_gradients and pending_chain(x) is not None
        self.x = (x.materialize() if isinstance(x, LazyTensor) else x).detach()
        self.stored_x = self.x.contiguous(memory_format=torch.channels_last) if isinstance(layer, nn.Conv2d) else self.x

    def on_floats(self) -> None:
        quantized = ops.ulq_fake_quantize(self.x, *self.clips, self.num_bits, self.fixed_min)[0]
        y = self.layer.compute_with_weight(quantized, self.weight)
        if self.deferred:
            norm = self.layer.refs.batch_norm
            torch.relu(y if norm is None else apply_batch_norm(y, norm))

    def on_integers(self) -> None:
        layer, x = self.layer, self.x
        if self.input_is_chain:
            x = torch.relu(x)  # for the pass that computes it
        codes, x_scale, x_offset, clip_max, clip_min, _ = ops.ulq_quantize(
            x, *self.clips, self.num_bits, self.fixed_min
        )
        act = QuantizedActivation(x, x, clip_max, clip_min, codes, x_scale, x_offset, self.num_bits)
        if self.packed is None or self.with_gradients:
            self.packed = ops.pack_weight(self.weight, self.scale, self.weight_bits)
        integer_product(layer, act, x, PackedWeight(*self.packed, self.scale))
        if self.with_gradients and layer.weight.requires_grad and not self.stash:
            ops.ulq_fake_quantize(x, *self.clips, self.num_bits, self.fixed_min)  # backward computes it once more

    def on_prepared_floats(self) -> None:
        layer, bias = self.layer, self.layer.bias
        x = ops.ulq_fake_quantize(self.stored_x, *self.clips, self.num_bits, self.fixed_min)[0]
        if not isinstance(layer, nn.Conv2d):
            if self.prepared is None:
                self.prepared = pack_linear_weight(self.weight, x.numel() // x.shape[-1])
            linear(x, self.prepared, bias)
            return
        geometry = conv_geometry(layer)
        if self.prepared is None:
            self.prepared = pack_conv_weight(self.weight, geometry, layer.groups, x.shape)
        conv2d(x, self.prepared, bias, geometry, layer.groups, None, IDENTITY)


def _is_stable(times: list[float]) -> bool:
    """Whether the two shortest agree within a tenth; other load on the machine only ever adds time."""
    first, second = sorted(times)[:2]
    return second <= 1.1 * first


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
