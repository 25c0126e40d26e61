"""The integer forward: a layer's product on 8-bit codes, its gradients those of the float path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.deferred import DeferPolicy, DeferredConv2d, DeferredTensor
from amct_ext.layers.fingerprint import fingerprint
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.integer_autograd import (
    FakeQuantProxy,
    IntegerProduct,
    QuantizedActivation,
    geometry_of,
    has_channels_last,
    integer_accumulators,
    integer_product,
    padding_of,
)
from amct_ext.layers.timing import integers_are_faster

_MOST_WEIGHTS = 65793  # per output channel: 255 * 128 * 65793 fits a 32-bit sum


class IntegerForward:
    """How one layer multiplies: always on integers, or where that was measured to be faster.

    ``choices`` holds what was measured, per shape of the input (without its first axis) and whether gradients were
    wanted; True stands for integers. Held by a layer whose forward may be integer. While the model ``tracker`` belongs
    to is evaluated without gradients, results of convolutions wait for what follows them (`DeferredTensor`).
    """

    def __init__(self, mode: str, tracker: ForwardTracker | None = None) -> None:
        self.mode = mode
        self.tracker = ForwardTracker() if tracker is None else tracker
        self.policy = DeferPolicy()
        self.choices: dict[tuple[tuple[int, ...], bool], bool] = {}
        self.used: bool | None = None  # by the last forward
        self._packed: tuple[Any, Tensor, Tensor, Tensor] | None = None
        self._sums: Tensor | None = None

    def __call__(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the float path is to be taken."""
        self._sums = None
        begun = layer.training or layer.ready  # before that an evaluation uses ranges of its own
        self.used = supports(layer, x) and begun and (self.mode == "integer" or self._faster(layer, x))
        if not self.used:
            return None
        if layer.training or torch.is_grad_enabled():
            self.drop_packed_weight()  # it is about to change
        made = _activation_codes(layer, x)
        if not torch.is_grad_enabled():
            present = self._current_weight(layer, x)
            self._keep_sums(layer, made, *present[:2])
            return (
                self._deferred(layer, made, x, *present)
                if self._may_defer(layer)
                else integer_product(layer, made, x, *present)
            )
        weight = layer._compressed_weight()
        scale = layer.weight_quant.last_scale()
        with torch.no_grad():
            packed, sums = ops.pack_weight(weight, scale, layer.weight_quant.num_bits)
            self._keep_sums(layer, made, packed, sums)
        y: Tensor = IntegerProduct.apply(
            made.proxy, weight, layer.bias, made._replace(x=x.detach()), layer, packed, sums, scale
        )
        return y

    def pop_accumulators(self) -> Tensor | None:
        """The int32 sums of the layer's product in the forward just made, where its shift search wants them; once."""
        sums, self._sums = self._sums, None
        return sums

    def _keep_sums(self, layer: Any, made: QuantizedActivation, packed: Tensor, sums: Tensor) -> None:
        if layer.feeds_shift_search:
            self._sums = integer_accumulators(layer, made, packed, sums)

    def drop_packed_weight(self) -> None:
        """Let go of the packed weight: the next evaluation packs it anew."""
        self._packed = None

    def _current_weight(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Packed weight, sums and scale; kept between evaluation forwards while nothing behind them changes."""
        sources = [layer.weight, *layer.weight_quant.parameters()]
        if layer.sparsity is not None:
            layer.sparsity.check(layer.weight)
            sources.append(layer.sparsity.mask)
        pieces = _pieces_to_look_at(layer, x)
        key = [fingerprint(t, pieces) for t in sources]
        if self._packed is None or self._packed[0] != key:
            weight = layer._compressed_weight()
            scale = layer.weight_quant.last_scale().clone()
            self._packed = (key, *ops.pack_weight(weight, scale, layer.weight_quant.num_bits), scale)
        return self._packed[1:]

    def _may_defer(self, layer: Any) -> bool:
        if layer.training or not (self.policy.allowed and isinstance(layer, nn.Conv2d)):
            return False
        return self.tracker.forward_id is not None and not layer.feeds_shift_search  # the search reads the result

    def _deferred(
        self, layer: Any, made: QuantizedActivation, x: Tensor, packed: Tensor, sums: Tensor, scale: Tensor
    ) -> Tensor:
        geometry = geometry_of(layer)
        sizes = zip(x.shape[2:], *geometry, strict=True)
        out = [(size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in sizes]
        if min(out) < 1:
            return integer_product(layer, made, x, packed, sums, scale)  # whose error it is
        convolution = DeferredConv2d(
            (made.codes, made.scale, made.offset),
            (packed, sums),
            scale,
            None if layer.bias is None else layer.bias.double(),
            geometry,
            has_channels_last(layer, x),
            policy=self.policy,
        )
        return DeferredTensor(convolution, torch.Size((x.shape[0], sums.numel(), *out)))

    def _faster(self, layer: Any, x: Tensor) -> bool:
        key = (tuple(x.shape[1:]), torch.is_grad_enabled())
        if key not in self.choices:
            self.choices[key] = integers_are_faster(layer, x.detach(), key[1], not key[1] and self._may_defer(layer))
        return self.choices[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_sums": None}


def _pieces_to_look_at(layer: Any, x: Tensor) -> int | None:
    """How much of a weight is compared with what was packed, so that it takes a fiftieth of the product's time.

    None, all of it, where it meets 4096 positions of an input (a picture of 64 x 64) or is small.
    """
    positions = x.numel() // max(x.shape[1 if x.dim() == 4 else -1], 1)
    if isinstance(layer, nn.Conv2d):
        positions //= layer.stride[0] * layer.stride[1]
    if positions >= 4096 or layer.weight.numel() <= 4096:
        return None
    return max(64, layer.weight.numel() * max(positions, 16) >> 19)


def unsupported_reason(layer: Any) -> str | None:
    """Why no input can take the integer forward of ``layer``; None where one can."""
    linear, conv = isinstance(layer, nn.Linear), isinstance(layer, nn.Conv2d)
    if not (linear or conv):
        return "no integer kernel for this type"
    if layer.weight_quant is None or layer.activation is None:
        return "not quantised"
    if max(layer.weight_quant.num_bits, layer.activation.num_bits) > 8:
        return "more than 8 bits"
    weight = layer.weight
    if weight[0].numel() > _MOST_WEIGHTS:
        return "sums may exceed 32 bits"
    if linear:
        return None
    if layer.groups != 1:
        return "groups"
    if layer.padding_mode != "zeros" or padding_of(layer) is None:
        return "padding"
    return None


def supports(layer: Any, x: Tensor) -> bool:
    """Whether ``x`` can take the integer forward: plain float32 on the CPU, outside of compilers and autocast."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(x) not in (Tensor, nn.Parameter, DeferredTensor) or type(layer.weight) not in (Tensor, nn.Parameter):
        return False
    if x.dtype != torch.float32 or layer.weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
        return False
    if x.numel() == 0 or (isinstance(layer, nn.Conv2d) and x.dim() != 4):
        return False
    return unsupported_reason(layer) is None


def _activation_codes(layer: Any, x: Tensor) -> QuantizedActivation:
    quantizer = layer.activation
    first = layer.act_quant is not None
    forward = quantizer.tracker.forward_id if quantizer.num_readers > 1 else None
    if not first:
        made = quantizer.shared_codes.take(x, forward)
        if made is not None:
            return made
    quantizer.calibrate(x)
    clips = (quantizer.clip_max, quantizer.clip_min, quantizer.prev_clip_max, quantizer.prev_clip_min)
    options = (quantizer.num_bits, quantizer.fixed_min)
    if type(x) is DeferredTensor and x.source is not None and not torch.is_grad_enabled():
        results = x.source.compute_codes(*clips, *options)
    else:
        results = ops.ulq_quantize(x.detach(), *clips, *options)
    codes, scale, offset, clip_max, clip_min, invalid = results
    proxy: Tensor = x
    if torch.is_grad_enabled():
        proxy = FakeQuantProxy.apply(x, quantizer.clip_max, quantizer.clip_min, clip_max, clip_min, quantizer.num_bits)
    made = QuantizedActivation(proxy, x, clip_max, clip_min, codes, scale, offset, quantizer.num_bits)
    quantizer.write_back(scale, offset, clip_max, clip_min, invalid)
    if first or forward is not None:
        quantizer.shared_codes.keep(made, x, quantizer.num_readers - 1, forward)
    return made
