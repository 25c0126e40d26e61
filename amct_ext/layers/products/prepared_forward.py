"""The prepared float forward of an evaluation: weights fake-quantised and packed once, results in oneDNN's layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amct_ext.layers.activation.types import FakeQuantized
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.products.deferred_source import (
    ComputedValues,
    DeferPolicy,
    EvaluationCount,
    Padding,
    pad_with_zeros,
)
from amct_ext.layers.products.deferred_tensor import DeferredTensor
from amct_ext.layers.products.fingerprint import Fingerprint
from amct_ext.layers.products.integer_ops import ConvGeometry, conv_geometry, output_is_channels_last
from amct_ext.layers.products.integer_support import is_plain_float32, may_defer, padding_reason, product_reason
from amct_ext.layers.products.prepared_conv import PreparedConv2d
from amct_ext.layers.products.prepared_ops import is_available, linear, pack_linear_weight
from amct_ext.layers.products.prepared_weight import PreparedConvWeight
from amct_ext.layers.products.weight_sources import fingerprint_samples, fingerprints


class _Cached(NamedTuple):
    key: list[Fingerprint]  # of the tensors that it was made of
    weight: PreparedConvWeight | Tensor


def unsupported_reason(layer: CompressedLayer) -> str | None:
    """Why no input can take the prepared forward of ``layer``; None where one can."""
    reason = product_reason(layer, "no packed product for this type") or padding_reason(layer)
    if reason is not None:
        return reason
    return None if is_available() else "this torch has no oneDNN"


class PreparedForward:
    """One layer's product on packed floats, in evaluations without gradients.

    The packed weight is kept while the tensors that it was made of keep version and content.
    """

    def __init__(self, tracker: ForwardTracker) -> None:
        self.tracker = tracker
        self.policy = DeferPolicy()
        self._cached: _Cached | None = None

    def supports(self, layer: CompressedLayer, x: Tensor) -> bool:
        """Whether ``x`` can take it, once the layer is ready."""
        if layer.training or torch.is_grad_enabled() or not is_plain_float32(layer, x):
            return False
        return unsupported_reason(layer) is None

    def __call__(self, layer: CompressedLayer, x: Tensor) -> Tensor:
        """The layer's output, deferred where a convolution's may be."""
        channels_last = isinstance(layer, nn.Conv2d) and output_is_channels_last(layer, x)
        results: list[FakeQuantized] = []
        values, padding = _stored(layer, x)
        quantized = layer.quantized_input(values, results)
        if isinstance(layer, nn.Conv2d):
            private = quantized is results[0].y and quantized is not results[0].x
            return self._convolve(layer, x.shape, quantized, padding, channels_last, private)
        weight = self._weight(layer, x)
        assert isinstance(weight, Tensor)
        return linear(quantized, weight, layer.bias)

    def drop_packed_weight(self) -> None:
        """Free the packed weight; the next evaluation packs it again."""
        self._cached = None

    def _convolve(
        self,
        layer: CompressedLayer,
        input_size: torch.Size,
        x: Tensor,
        padding: Padding | None,
        channels_last: bool,
        private: bool,
    ) -> Tensor:
        """Of the quantised ``x`` with zeros around it, which make up ``input_size``."""
        weight = self._weight(layer, x)
        assert isinstance(weight, PreparedConvWeight)
        size = weight.geometry.output_size(input_size[2:])
        geometry, x = _with_padding(weight.geometry, x, padding)
        x = x.contiguous(memory_format=torch.channels_last)
        source = PreparedConv2d(x, weight, geometry, channels_last, evaluations=EvaluationCount(self.policy))
        if not may_defer(layer, self.tracker) or min(size) < 1:
            return source.compute()  # raises where the kernel does not fit
        shape = torch.Size((x.shape[0], layer.weight.shape[0], *size))
        if private and self.policy.allowed:
            return DeferredTensor(source, shape)
        return DeferredTensor(ComputedValues(source.compute_channels_last(), channels_last), shape)

    def _weight(self, layer: CompressedLayer, x: Tensor) -> PreparedConvWeight | Tensor:
        key = fingerprints(layer, fingerprint_samples(layer, x), with_bias=True)
        if self._cached is None or self._cached.key != key:
            self._cached = _Cached(key, _prepare(layer, x))
        return self._cached.weight

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


def _stored(layer: CompressedLayer, x: Tensor) -> tuple[Tensor, Padding | None]:
    """``x`` as it lies in memory, and zeros around it: a deferred tensor's values are computed once for all readers."""
    if type(x) is not DeferredTensor:
        return x, None
    quantizer = layer.act_quant
    if not isinstance(layer, nn.Conv2d) or (quantizer is not None and _has_hooks(quantizer)):
        return x.channels_last_values(), None  # hooks see all of the input
    return x.unpadded_values()


def _with_padding(geometry: ConvGeometry, x: Tensor, padding: Padding | None) -> tuple[ConvGeometry, Tensor]:
    """The same convolution of ``x`` with these zeros around it: by its own padding where they are symmetric."""
    if padding is None:
        return geometry, x
    left, right, top, bottom = padding
    if (left, top) != (right, bottom):
        return geometry, pad_with_zeros(x, padding, torch.channels_last)
    height, width = geometry.padding
    return geometry._replace(padding=(height + top, width + left)), x


def _prepare(layer: CompressedLayer, x: Tensor) -> PreparedConvWeight | Tensor:
    weight = layer.compressed_weight().detach()
    if not isinstance(layer, nn.Conv2d):
        return pack_linear_weight(weight, x.numel() // x.shape[-1])
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return PreparedConvWeight(weight.clone(), bias, conv_geometry(layer), layer.groups, x.shape)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
