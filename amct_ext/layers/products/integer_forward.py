"""The integer forward: a layer's product on 8-bit codes, with the gradients of the float path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.activation.types import QuantizedActivation
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.products.deferred_conv import DeferredConv2d
from amct_ext.layers.products.deferred_source import DeferPolicy, EvaluationCount
from amct_ext.layers.products.deferred_tensor import DeferredTensor
from amct_ext.layers.products.fingerprint import Fingerprint
from amct_ext.layers.products.integer_autograd import apply_integer_product, fake_quant_proxy
from amct_ext.layers.products.integer_ops import (
    PackedWeight,
    conv_geometry,
    integer_accumulators,
    integer_product,
    output_is_channels_last,
)
from amct_ext.layers.products.integer_support import is_plain_float32, may_defer, unsupported_reason
from amct_ext.layers.products.weight_sources import fingerprint_samples, fingerprints


class _CachedWeight(NamedTuple):
    key: list[Fingerprint]  # of the tensors that it was packed from
    weight: PackedWeight


class IntegerForward:
    """One layer's product on 8-bit codes, with the gradients of the float path.

    The packed weight is kept while the tensors that it was made of keep version and content.
    """

    def __init__(self, tracker: ForwardTracker) -> None:
        self.tracker = tracker
        self.policy = DeferPolicy()
        self._cached: _CachedWeight | None = None
        self._accumulators: Tensor | None = None

    def supports(self, layer: CompressedLayer, x: Tensor) -> bool:
        """Whether ``x`` can take it, once the layer is ready."""
        return is_plain_float32(layer, x) and unsupported_reason(layer) is None

    def __call__(self, layer: CompressedLayer, x: Tensor) -> Tensor:
        """The layer's output, deferred where a convolution's may be."""
        act = _quantize_activation(layer, x)
        if torch.is_grad_enabled():
            return self._differentiable(layer, act, x)
        weight = self._packed_weight(layer, x)
        self._keep_accumulators(layer, act, weight)
        if self.policy.allowed and may_defer(layer, self.tracker) and isinstance(layer, nn.Conv2d):
            return self._deferred(layer, act, x, weight)
        return integer_product(layer, act, x, weight)

    def pop_accumulators(self) -> Tensor | None:
        """The int32 accumulators of the last forward, where the layer's shift search needs them; once."""
        accumulators, self._accumulators = self._accumulators, None
        return accumulators

    def drop_packed_weight(self) -> None:
        """Free the packed weight; the next evaluation packs it again."""
        self._cached = None

    def _differentiable(self, layer: CompressedLayer, act: QuantizedActivation, x: Tensor) -> Tensor:
        assert layer.weight_quant is not None
        weight = layer.compressed_weight()
        scale = layer.weight_quant.last_scale()
        with torch.no_grad():
            packed = PackedWeight(*ops.pack_weight(weight, scale, layer.weight_quant.num_bits), scale)
            self._keep_accumulators(layer, act, packed)
        return apply_integer_product(act.proxy, weight, layer.bias, act._replace(x=x.detach()), layer, packed)

    def _keep_accumulators(self, layer: CompressedLayer, act: QuantizedActivation, weight: PackedWeight) -> None:
        if layer.feeds_shift_search:
            self._accumulators = integer_accumulators(layer, act, weight)

    def _packed_weight(self, layer: CompressedLayer, x: Tensor) -> PackedWeight:
        """The packed weight, cached between evaluation forwards while none of its sources changes."""
        assert layer.weight_quant is not None
        key = fingerprints(layer, fingerprint_samples(layer, x))
        if self._cached is None or self._cached.key != key:
            weight = layer.compressed_weight()
            scale = layer.weight_quant.last_scale().clone()
            packed = PackedWeight(*ops.pack_weight(weight, scale, layer.weight_quant.num_bits), scale)
            self._cached = _CachedWeight(key, packed)
        return self._cached.weight

    def _deferred(self, layer: nn.Conv2d, act: QuantizedActivation, x: Tensor, weight: PackedWeight) -> Tensor:
        geometry = conv_geometry(layer)
        size = geometry.output_size(x.shape[2:])
        conv = DeferredConv2d(
            (act.codes, act.scale, act.offset),
            (weight.packed, weight.sums),
            weight.scale,
            None if layer.bias is None else layer.bias.double(),
            geometry,
            output_is_channels_last(layer, x),
            evaluations=EvaluationCount(self.policy),
        )
        if min(size) < 1:
            return conv.compute()  # raises: the kernel does not fit
        return DeferredTensor(conv, torch.Size((x.shape[0], weight.sums.numel(), *size)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None, "_accumulators": None}


def _quantize_activation(layer: CompressedLayer, x: Tensor) -> QuantizedActivation:
    """The codes of ``x``, those kept by the layer that ran first on it where they are valid here."""
    quantizer = layer.input_quantizer
    assert quantizer is not None
    first = layer.act_quant is not None
    forward = quantizer.tracker.forward_id if quantizer.num_readers > 1 else None
    if not first:
        kept = quantizer.shared_codes.take(x, forward)
        if kept is not None:
            return kept
    quantizer.calibrate(x)
    clips = (quantizer.clip_max, quantizer.clip_min, quantizer.prev_clip_max, quantizer.prev_clip_min)
    if type(x) is DeferredTensor and not torch.is_grad_enabled():
        results = x.compute_codes(clips, quantizer.num_bits, quantizer.fixed_min)
    else:
        results = ops.ulq_quantize(x.detach(), *clips, quantizer.num_bits, quantizer.fixed_min)
    codes, scale, offset, clip_max, clip_min, invalid = results
    proxy = x
    if torch.is_grad_enabled():
        proxy = fake_quant_proxy(x, quantizer.clip_max, quantizer.clip_min, clip_max, clip_min, quantizer.num_bits)
    act = QuantizedActivation(proxy, x, clip_max, clip_min, codes, scale, offset, quantizer.num_bits)
    quantizer.write_back(scale, offset, clip_max, clip_min, invalid)
    if first or forward is not None:
        quantizer.shared_codes.put(act, x, quantizer.num_readers - 1, forward)
    return act
