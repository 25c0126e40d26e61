"""The integer forward: a layer's product on 8-bit codes, its gradients those of the float path."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from amct_ext import ops
from amct_ext.layers.pending import Convolution, Patience, Pending, Running
from amct_ext.layers.stash import rounded_again

_MOST_WEIGHTS = 65793  # per output channel: 255 * 128 * 65793 fits a 32-bit sum
_FEWEST, _MOST = 3, 12  # rounds of a measurement


class Codes(NamedTuple):
    """An activation as codes, and what its readers need to carry gradients back."""

    carrier: Tensor  # in the autograd graph stands for the quantised activation; its values mean nothing
    x: Tensor
    clip_max: Tensor
    clip_min: Tensor
    codes: Tensor
    scale: Tensor
    offset: Tensor
    num_bits: int


class IntegerForward:
    """How one layer multiplies: always on integers, or where that was measured to be faster.

    ``choices`` holds what was measured, per shape of the input (without its first axis) and whether gradients were
    wanted; True stands for integers. Held by a layer whose forward may be integer. While the model ``running`` belongs
    to is evaluated without gradients, results of convolutions wait for what follows them (`Pending`).
    """

    def __init__(self, mode: str, running: Running | None = None) -> None:
        self.mode = mode
        self.running = Running() if running is None else running
        self.patience = Patience()
        self.choices: dict[tuple[tuple[int, ...], bool], bool] = {}
        self.used: bool | None = None  # by the last forward
        self._packed: tuple[Any, Tensor, Tensor, Tensor] | None = None
        self._sums: Tensor | None = None

    def __call__(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the float path is to be taken."""
        self._sums = None
        self.used = applies(layer, x) and (self.mode == "integer" or self._faster(layer, x))
        if not self.used:
            return None
        if layer.training or torch.is_grad_enabled():
            self.forget_weight()  # it is about to change
        made = _activation_codes(layer, x)
        if not torch.is_grad_enabled():
            present = self._present_weight(layer)
            self._keep_sums(layer, made, *present[:2])
            return (
                self._pending(layer, made, x, *present) if self._may_wait(layer) else _product(layer, made, x, *present)
            )
        weight = layer._compressed_weight()
        scale = layer.weight_quant.used_scale()
        with torch.no_grad():
            packed, sums = ops.pack_weight(weight, scale, layer.weight_quant.num_bits)
            self._keep_sums(layer, made, packed, sums)
        y: Tensor = _Product.apply(
            made.carrier, weight, layer.bias, made._replace(x=x.detach()), layer, packed, sums, scale
        )
        return y

    def take_sums(self) -> Tensor | None:
        """The int32 sums of the layer's product in the forward just made, where its shift search wants them; once."""
        sums, self._sums = self._sums, None
        return sums

    def _keep_sums(self, layer: Any, made: Codes, packed: Tensor, sums: Tensor) -> None:
        if layer.search_n is not None and not layer.training and layer.search_n.wants_data:
            self._sums = _accumulators(layer, made, packed, sums)

    def forget_weight(self) -> None:
        """Let go of the packed weight: the next evaluation packs it anew."""
        self._packed = None

    def _present_weight(self, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Packed weight, sums and scale; kept between evaluation forwards while no tensor behind them changes."""
        sources = [layer.weight, *layer.weight_quant.parameters()]
        if layer.sparsity is not None:
            sources.append(layer.sparsity.mask)
        key = [(id(t), t.data_ptr(), t._version) for t in sources]
        if self._packed is None or self._packed[0] != key:
            weight = layer._compressed_weight()
            scale = layer.weight_quant.used_scale().clone()
            self._packed = (key, *ops.pack_weight(weight, scale, layer.weight_quant.num_bits), scale)
        return self._packed[1:]

    def _may_wait(self, layer: Any) -> bool:
        if layer.training or not (self.running.depth and self.patience.left and isinstance(layer, nn.Conv2d)):
            return False
        search: Any = layer.search_n  # reads the result
        return bool(search is None or not search.wants_data)

    def _pending(self, layer: Any, made: Codes, x: Tensor, packed: Tensor, sums: Tensor, scale: Tensor) -> Tensor:
        geometry = _geometry(layer)
        sizes = zip(x.shape[2:], *geometry, strict=True)
        out = [(size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in sizes]
        if min(out) < 1:
            return _product(layer, made, x, packed, sums, scale)  # whose error it is
        convolution = Convolution(
            (made.codes, made.scale, made.offset),
            (packed, sums),
            scale,
            None if layer.bias is None else layer.bias.double(),
            geometry,
            _channels_last(layer, x),
            patience=self.patience,
        )
        return Pending(convolution, torch.Size((x.shape[0], sums.numel(), *out)))

    def _faster(self, layer: Any, x: Tensor) -> bool:
        key = (tuple(x.shape[1:]), torch.is_grad_enabled())
        if key not in self.choices:
            self.choices[key] = _measured(layer, x.detach(), key[1], not key[1] and self._may_wait(layer))
        return self.choices[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_sums": None}


def obstacle(layer: Any) -> str | None:
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
    if layer.padding_mode != "zeros" or _padding(layer) is None:
        return "padding"
    return None


def applies(layer: Any, x: Tensor) -> bool:
    """Whether ``x`` can take the integer forward: plain float32 on the CPU, outside of compilers and autocast."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(x) not in (Tensor, nn.Parameter, Pending) or type(layer.weight) not in (Tensor, nn.Parameter):
        return False
    if x.dtype != torch.float32 or layer.weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
        return False
    if x.numel() == 0 or (isinstance(layer, nn.Conv2d) and x.dim() != 4):
        return False
    return obstacle(layer) is None


def _padding(layer: Any) -> tuple[int, int] | None:
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    height, width = layer.padding
    return height, width


def _activation_codes(layer: Any, x: Tensor) -> Codes:
    quantizer = layer.activation
    first = layer.act_quant is not None
    if not first:
        made = quantizer.shared_codes.take(x)
        if made is not None:
            return made
    else:
        quantizer.calibrate(x)
    clips = (quantizer.clip_max, quantizer.clip_min, quantizer.prev_clip_max, quantizer.prev_clip_min)
    options = (quantizer.num_bits, quantizer.fixed_min)
    if type(x) is Pending and x.made is not None and not torch.is_grad_enabled():
        results = x.made.requantized(*clips, *options)
    else:
        results = ops.ulq_quantize(x.detach(), *clips, *options)
    codes, scale, offset, clip_max, clip_min, invalid = results
    carrier: Tensor = x
    if torch.is_grad_enabled():
        carrier = _Carrier.apply(x, quantizer.clip_max, quantizer.clip_min, clip_max, clip_min, quantizer.num_bits)
    made = Codes(carrier, x, clip_max, clip_min, codes, scale, offset, quantizer.num_bits)
    if first:
        quantizer.write_back(scale, offset, clip_max, clip_min, invalid)
        quantizer.shared_codes.keep(made, x, quantizer.num_readers - 1)
    return made


def _product(layer: Any, made: Codes, x: Tensor, packed: Tensor, sums: Tensor, scale: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return ops.integer_linear(made.codes, made.scale, made.offset, packed, sums, scale, layer.bias)
    return ops.integer_conv2d(
        made.codes,
        made.scale,
        made.offset,
        packed,
        sums,
        scale,
        layer.bias,
        *_geometry(layer),
        _channels_last(layer, x),
    )


def _accumulators(layer: Any, made: Codes, packed: Tensor, sums: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return ops.integer_linear_accumulators(made.codes, made.offset, packed, sums)
    return ops.integer_conv2d_accumulators(made.codes, made.offset, packed, sums, *_geometry(layer))


def _geometry(layer: Any) -> tuple[Any, Any, Any, Any]:
    return layer.kernel_size, layer.stride, _padding(layer) or (0, 0), layer.dilation


def _channels_last(layer: Any, x: Tensor) -> bool:
    """Whether the float convolution lays out its result so."""
    last = torch.channels_last
    return any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, layer.weight))


class _Carrier(torch.autograd.Function):
    """Stands for the fake-quantised activation in the graph without being computed; its gradient is that of the op."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor, high: Tensor, low: Tensor, num_bits: int
    ) -> Tensor:
        ctx.save_for_backward(x, high, low)
        ctx.num_bits = num_bits
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, high, low = ctx.saved_tensors
        return *ops.ulq_fake_quantize_backward(grad, x, high, low, ctx.num_bits), None, None, None


class _Product(torch.autograd.Function):
    """The product on codes; backward rounds the float input again, with the bits of the float path."""

    @staticmethod
    def forward(
        ctx: Any,
        carrier: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        made: Codes,
        layer: Any,
        packed: Tensor,
        sums: Tensor,
        scale: Tensor,
    ) -> Tensor:
        y = _product(layer, made, made.x, packed, sums, scale)
        x = made.x  # without its history; the carrier's node holds the same memory
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, made.clip_max, made.clip_min, weight)
        ctx.num_bits, ctx.shape, ctx.bias = made.num_bits, x.shape, None if bias is None else list(bias.shape)
        ctx.conv = None
        if isinstance(layer, nn.Conv2d):
            ctx.conv = (layer.stride, _padding(layer), layer.dilation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, high, low, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        quantised = None
        if wanted[1]:
            quantised = rounded_again(x, high, low, ctx.num_bits)
        backward = _linear_backward if ctx.conv is None else _conv_backward
        return *backward(ctx, grad, quantised, weight, wanted), None, None, None, None, None


def _conv_backward(ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, wanted: Any) -> tuple[Tensor | None, ...]:
    stride, padding, dilation = ctx.conv
    if x is None:  # only its shape counts
        x = grad.new_empty(()).expand(ctx.shape)
    grads: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias, stride, padding, dilation, False, (0, 0), 1, wanted
    )
    return grads


def _linear_backward(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, wanted: Any
) -> tuple[Tensor | None, ...]:
    rows = grad.reshape(-1, grad.shape[-1])
    d_x = rows.mm(weight).view(ctx.shape) if wanted[0] else None
    d_weight = None if x is None else rows.t().mm(x.reshape(-1, x.shape[-1]))
    return d_x, d_weight, rows.sum(0) if wanted[2] else None


def _measured(layer: Any, x: Tensor, with_gradients: bool, with_norm: bool) -> bool:
    """Whether integers are faster: both ways are run on ``x``, in turns; nothing of the layer changes.

    ``with_norm``: on integers, the BatchNorm that follows costs nothing.
    """
    quantizer = layer.activation
    clips = (quantizer.clip_max, quantizer.clip_min, quantizer.prev_clip_max, quantizer.prev_clip_min)
    options = (quantizer.num_bits, quantizer.fixed_min)
    bits = layer.weight_quant.num_bits
    with torch.no_grad():
        scale = layer.weight_quant.present_scale(layer.masked_weight())
        weight = ops.lsq_fake_quantize(layer.masked_weight(), scale, bits, 0 if scale.numel() > 1 else None)
        packed = ops.pack_weight(weight, scale, bits)

        def on_floats() -> None:
            y = layer._compute(ops.ulq_fake_quantize(x, *clips, *options)[0], weight)
            if with_norm:
                layer.normalized(y)

        def on_integers() -> None:
            codes, *rest = ops.ulq_quantize(x, *clips, *options)
            made = Codes(x, x, rest[2], rest[3], codes, rest[0], rest[1], bits)
            again = ops.pack_weight(weight, scale, bits) if with_gradients else packed
            _product(layer, made, x, *again, scale)
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
