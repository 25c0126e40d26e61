"""The integer forward: a layer's product on 8-bit codes, with the gradients of the float path; and the choice of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.activation.types import QuantizedActivation
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.product_path import Way
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
from amct_ext.layers.products.integer_support import supports
from amct_ext.layers.products.prepared_forward import PreparedForward
from amct_ext.layers.products.timing import fastest
from amct_ext.layers.products.weight_sources import fingerprint_samples, fingerprints


class _CachedWeight(NamedTuple):
    key: list[Fingerprint]  # of the tensors that it was packed from
    weight: PackedWeight


class IntegerForward:
    """How one layer computes its product: on integers, on prepared floats, or by the way that is faster.

    ``mode``: "integer", "prepared" or "auto". ``choices``: what was measured, by shape of the input (without its first
    axis), whether gradients were recorded, and the layer's mode. Held by a layer that has another way than floats.
    While the model of ``tracker`` is evaluated without gradients, results of convolutions are deferred
    (`DeferredTensor`).
    """

    def __init__(self, mode: str, tracker: ForwardTracker | None = None) -> None:
        self.mode = mode
        self.tracker = ForwardTracker() if tracker is None else tracker
        self.policy = DeferPolicy()
        self.prepared = PreparedForward(self.tracker)
        self.choices: dict[tuple[tuple[int, ...], bool, bool], Way] = {}
        self.used: Way = "float"  # by the last forward
        self._cached: _CachedWeight | None = None
        self._accumulators: Tensor | None = None

    def __call__(self, layer: CompressedLayer, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the float path is to be taken."""
        self._accumulators = None
        self.used = self._choose(layer, x)
        if layer.training or torch.is_grad_enabled():
            self.drop_packed_weight()  # it is about to change
        if self.used == "prepared":
            return self.prepared(layer, x)
        if self.used == "float":
            return None
        act = _quantize_activation(layer, x)
        if torch.is_grad_enabled():
            return self._differentiable(layer, act, x)
        weight = self._packed_weight(layer, x)
        self._keep_accumulators(layer, act, weight)
        if self._may_defer(layer) and isinstance(layer, nn.Conv2d):
            return self._deferred(layer, act, x, weight)
        return integer_product(layer, act, x, weight)

    def pop_accumulators(self) -> Tensor | None:
        """The int32 accumulators of the last forward, where the layer's shift search needs them; once."""
        accumulators, self._accumulators = self._accumulators, None
        return accumulators

    def drop_packed_weight(self) -> None:
        """Free the packed weight; the next evaluation packs it again."""
        self._cached = None
        self.prepared.drop_packed_weight()

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

    def _may_defer(self, layer: CompressedLayer) -> bool:
        if layer.training or not (self.policy.allowed and isinstance(layer, nn.Conv2d)):
            return False
        # The shift search reads the result.
        return self.tracker.forward_id is not None and not layer.feeds_shift_search

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

    def _choose(self, layer: CompressedLayer, x: Tensor) -> Way:
        """Which way the product of ``x`` takes."""
        ready = layer.training or layer.ready  # before that an evaluation uses ranges of its own
        ways: list[Way] = []
        if self.mode != "prepared" and ready and supports(layer, x):
            ways.append("integer")
        if self.mode != "integer" and ready and self.prepared.supports(layer, x):
            ways.append("prepared")
        if self.mode != "auto" or not ways:
            return ways[0] if ways else "float"
        key = (tuple(x.shape[1:]), torch.is_grad_enabled(), layer.training)
        if key not in self.choices:
            # In its first evaluation the shift search reads the result, which is deferred from then on.
            evaluates = not (layer.training or key[1]) and self.tracker.forward_id is not None
            deferred = evaluates and self.policy.allowed and isinstance(layer, nn.Conv2d)
            self.choices[key] = fastest(layer, x, ways, key[1], deferred)
        return self.choices[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None, "_accumulators": None}


def _quantize_activation(layer: CompressedLayer, x: Tensor) -> QuantizedActivation:
    """The codes of ``x``, those kept by the layer that ran first on it where they are valid here."""
    quantizer = layer.activation
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
