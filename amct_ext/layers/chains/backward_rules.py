"""What each op of a backward makes of chain tensors; NotImplemented: the op reads the values.

The quantiser's backward computes the gradients of the whole chain. Those of BatchNorm's input and parameters then pass
through the nodes in between, which read nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.layers.chains.batch_norm_chain import BatchNorm, BatchNormChain, OpOverload, activation_of
from amct_ext.layers.chains.chain_values import (
    ChainGradient,
    ChainTensorBase,
    ChainValues,
    ResidualGradient,
    materialize,
    pending_residual,
    read_later,
)

_aten = torch.ops.aten
_amct = torch.ops.amct_ext


def _fake_quantize_backward(
    func: OpOverload, grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> Any:
    # Values that something has read have other gradients, too; those are summed before the next node, so computing
    # further here would be wasted. With create_graph the values must be those that torch's graph differentiates.
    if not isinstance(x, ChainTensorBase) or torch.is_grad_enabled():
        return NotImplemented
    values, chain, upstream = x.chain_values, x.chain_values.chain, materialize(grad)
    if chain is None or upstream.dtype != torch.float32:
        return NotImplemented
    read_upstream = read_later(upstream)
    if chain.is_sum_with_relu and upstream.shape == x.shape:
        quantizer = (clip_max, clip_min, num_bits)
        residual = ResidualGradient(values, read_upstream, quantizer)
        clips = ops.ulq_clip_gradients(upstream, values.get(), *quantizer)
        return x.with_values(ChainValues(residual=residual, compute=residual.compute, reads=(values,))), *clips
    if not values.pending or chain.is_sum:
        return NotImplemented
    dx, d_weight, d_bias, d_max, d_min = chain.quantized_backward(upstream, clip_max, clip_min, num_bits)

    def compute() -> Tensor:
        return ops.ulq_fake_quantize_backward(read_upstream(), values.get(), clip_max, clip_min, num_bits)[0]

    gradient = ChainGradient(chain, (dx, d_weight, d_bias))
    return x.with_values(ChainValues(gradient=gradient, compute=compute, reads=(values,))), d_max, d_min


def _propagated(
    grad: ChainTensorBase,
    remaining: ChainGradient,
    compute: Callable[[], Tensor],
    reads: tuple[ChainValues, ...] = (),
    like: Tensor | None = None,
) -> ChainTensorBase:
    """The gradient behind the node that took ``grad``."""
    return grad.with_values(ChainValues(gradient=remaining, compute=compute, reads=(grad.chain_values, *reads)), like)


def _copy_of_gradient(grad: ChainTensorBase) -> ChainTensorBase:
    values = grad.chain_values
    return grad.with_values(
        ChainValues(gradient=values.gradient, compute=lambda: values.get().clone(), reads=(values,))
    )


def backward_of_pad(func: OpOverload, grad: ChainTensorBase, padding: list[int]) -> Any:
    """The gradient within a padding with zeros: a padding of negative sizes."""
    if not any(padding):
        return _copy_of_gradient(grad)
    gradient = grad.chain_values.gradient
    if gradient is None or torch.is_grad_enabled() or gradient.chain.padding != tuple(-size for size in padding):
        return NotImplemented
    values, remaining = grad.chain_values, replace(gradient, chain=replace(gradient.chain, padding=None))
    return _propagated(grad, remaining, lambda: func(values.get(), padding), like=gradient.results[0])


def add_gradients(x: Tensor, other: Tensor) -> Tensor | None:
    """The sum of two gradients, of which one waits for its ReLU; None where none does."""
    if torch.is_grad_enabled():
        return None
    for grad, added in ((x, other), (other, x)):
        residual = pending_residual(grad)
        if residual is None or residual.addend is not None or not isinstance(grad, ChainTensorBase):
            continue
        addend = materialize(added)
        if not grad.chain_values.pending or addend.dtype != torch.float32:  # the other may be an alias
            return None
        if addend.shape != grad.shape or addend.stride() != grad.stride():
            return None
        residual = replace(residual, addend=read_later(addend))
        reads = (grad.chain_values, *((added.chain_values,) if isinstance(added, ChainTensorBase) else ()))
        return grad.with_values(ChainValues(residual=residual, compute=residual.compute, reads=reads))
    return None


def _relu_of_sum_backward(
    func: OpOverload, grad: Tensor, result: ChainTensorBase, arguments: tuple[float, ...]
) -> ChainTensorBase:
    """Computed at once; as a chain tensor, so that autograd adds it to what waits by a rule and not in place."""
    residual = pending_residual(grad)
    if residual is not None and residual.result is result.chain_values:
        return result.with_values(ChainValues(value=residual.through_relu()))
    value = func(materialize(grad), result.chain_values.get(), *arguments)
    return result.with_values(ChainValues(value=value), value)


def _activation_backward(op: OpOverload) -> Callable[..., Any]:
    def rule(func: OpOverload, grad: Tensor, saved: Tensor, *arguments: float) -> Any:
        of_saved = saved.chain_values.chain if isinstance(saved, ChainTensorBase) else None
        if of_saved is None or not isinstance(saved, ChainTensorBase) or torch.is_grad_enabled():
            return NotImplemented
        if op is _aten.relu.default and any(arguments):
            return NotImplemented  # torch.nn.Threshold's backward is the same op
        if of_saved.is_sum:
            return _relu_of_sum_backward(func, grad, saved, arguments) if of_saved.is_sum_with_relu else NotImplemented
        values_saved = saved.chain_values
        gradient = grad.chain_values.gradient if isinstance(grad, ChainTensorBase) else None
        if gradient is not None and isinstance(grad, ChainTensorBase):
            chain, values = gradient.chain, grad.chain_values
            same = of_saved.norm is chain.norm and chain.activation is not None and chain.activation.op is op
            if chain.padding is not None or not same:
                return NotImplemented
            remaining = replace(gradient, chain=replace(chain, activation=None))
            return _propagated(
                grad, remaining, lambda: func(values.get(), values_saved.get(), *arguments), (values_saved,)
            )
        activation = activation_of(op, arguments)
        upstream = materialize(grad)
        if of_saved.padding is not None or upstream.dtype != torch.float32:
            return NotImplemented
        # The op has saved its input, or its result; another activation function's result is neither.
        if activation is None or of_saved.activation not in (None, activation):
            return NotImplemented
        read_upstream = read_later(upstream)
        results = BatchNormChain(of_saved.norm, activation=activation).backward(upstream)
        values = ChainValues(
            gradient=ChainGradient(BatchNormChain(of_saved.norm), results),
            compute=lambda: func(read_upstream(), values_saved.get(), *arguments),
            reads=(values_saved,),
        )
        return saved.with_values(values)

    return rule


def _batch_norm_backward(
    func: OpOverload,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    training: bool,
    eps: float,
    output_mask: list[bool],
) -> Any:
    if not isinstance(x, ChainTensorBase) or x.chain_values.value is None or torch.is_grad_enabled():
        return NotImplemented
    gradient = grad.chain_values.gradient if isinstance(grad, ChainTensorBase) else None
    if gradient is not None:
        norm = gradient.chain.norm
        if not gradient.chain.is_norm_alone or x.chain_values.value is not norm.x or training is not norm.training:
            return NotImplemented
        if save_mean is None or save_mean.data_ptr() != norm.mean.data_ptr():
            return NotImplemented  # another BatchNorm on the same input
        results = gradient.results
    elif training and save_mean is not None and save_invstd is not None and grad.dtype == torch.float32:
        norm = BatchNorm(x.chain_values.value, save_mean, save_invstd, weight, None, training)
        results = BatchNormChain(norm).backward(materialize(grad))
    else:
        return NotImplemented
    return tuple(result if wanted else None for result, wanted in zip(results, output_mask, strict=True))


BACKWARD_RULES: dict[OpOverload, Callable[..., Any]] = {
    _amct.ulq_fake_quantize_backward.default: _fake_quantize_backward,
    _aten.threshold_backward.default: _activation_backward(_aten.relu.default),
    _aten.hardtanh_backward.default: _activation_backward(_aten.hardtanh.default),
    _aten.hardswish_backward.default: _activation_backward(_aten.hardswish.default),
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
}
