"""Which layers and inputs can take the integer forward, and what of that holds for prepared floats, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.forward_context import traced_or_transformed
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.lazy_tensor import LazyTensor
from amct_ext.layers.products.integer_ops import conv_padding

_MAX_REDUCTION = 65793  # weights per output channel: 255 * 128 * 65793 fits a 32-bit sum


def product_reason(layer: CompressedLayer, no_kernel: str) -> str | None:
    """Why ``layer`` has no other path than floats, integer or prepared; ``no_kernel``: the reason of other types."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return no_kernel
    if layer.refs.product is not None:
        return "a forward of its class's own"
    return "not quantised" if layer.weight_quant is None or layer.input_quantizer is None else None


def padding_reason(layer: CompressedLayer) -> str | None:
    """Why a convolution's padding cannot be the kernels' own."""
    fits = not isinstance(layer, nn.Conv2d) or (layer.padding_mode == "zeros" and conv_padding(layer) is not None)
    return None if fits else "padding"


def unsupported_reason(layer: CompressedLayer) -> str | None:
    """Why no input can take the integer forward of ``layer``; None where one can."""
    reason = product_reason(layer, "no integer kernel for this type")
    if reason is not None:
        return reason
    assert layer.weight_quant is not None and layer.input_quantizer is not None
    if max(layer.weight_quant.num_bits, layer.input_quantizer.num_bits) > 8:
        return "more than 8 bits"
    if layer.weight[0].numel() > _MAX_REDUCTION:
        return "sums may exceed 32 bits"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return "groups"
    return padding_reason(layer)


def is_plain_float32(layer: CompressedLayer, x: Tensor) -> bool:
    """Whether input and weight are plain float32 on the CPU, outside of compilers and autocast, with values."""
    if traced_or_transformed() or torch.is_autocast_enabled("cpu"):
        return False
    if not (type(x) in (Tensor, nn.Parameter) or isinstance(x, LazyTensor)):
        return False
    if type(layer.weight) not in (Tensor, nn.Parameter):
        return False
    if x.dtype != torch.float32 or layer.weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return x.numel() > 0 and (x.dim() == 4 or not isinstance(layer, nn.Conv2d))


def may_defer(layer: CompressedLayer, tracker: ForwardTracker) -> bool:
    """Whether what follows the layer can be computed with it: a convolution, in an evaluation of the model."""
    if layer.training or not isinstance(layer, nn.Conv2d):
        return False
    return tracker.forward_id is not None and not layer.feeds_shift_search  # which reads the result
