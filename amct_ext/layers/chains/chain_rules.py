"""What each op makes of chain tensors, forward and backward; NotImplemented: the op reads plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.layers.chains.batch_norm_chain import BatchNorm, BatchNormChain, OpOverload, activation_of, batch_norm
from amct_ext.layers.chains.chain_values import ChainGradient, ChainValues, TensorOfValues, plain, unchanged
from amct_ext.ops.activation_ulq import write_used

_aten = torch.ops.aten
_amct = torch.ops.amct_ext


def _pending_chain(x: object) -> BatchNormChain | None:
    return x.lazy.chain if isinstance(x, TensorOfValues) and x.lazy.pending else None


# -- aliases and copies


def _alias(func: OpOverload, x: TensorOfValues) -> TensorOfValues:
    return x.with_values(x.lazy)


def _clone(func: OpOverload, x: TensorOfValues, *, memory_format: torch.memory_format | None = None) -> Any:
    chain = _pending_chain(x)
    if chain is None or memory_format not in (None, torch.preserve_format):
        return NotImplemented
    return x.with_values(ChainValues(chain=chain, origin=x.lazy.origin))


# -- forward


def _batch_norm(func: OpOverload, x: Tensor, *arguments: Any) -> Any:
    if not isinstance(x, TensorOfValues) or x.lazy.fixed or x.lazy.value is None or x.lazy.gradient is not None:
        return NotImplemented
    weight, bias, running_mean, running_var, training, *_ = arguments
    others = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    if any(isinstance(t, TensorOfValues) or t.dtype != torch.float32 or not t.is_contiguous() for t in others):
        return NotImplemented
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return NotImplemented  # torch computes these in another way
    if x.numel() <= x.shape[1] or (not training and (running_mean is None or running_var is None)):
        return NotImplemented
    norm = batch_norm(x.lazy.value, *arguments)
    values = ChainValues(chain=BatchNormChain(norm), origin=x.lazy)
    return x.with_values(values), norm.mean, norm.invstd  # by which backward knows the BatchNorm


def _activation(op: OpOverload, in_place: bool) -> Callable[..., Any]:
    def rule(func: OpOverload, x: TensorOfValues, *arguments: float) -> Any:
        chain = _pending_chain(x)
        if chain is None or not chain.is_norm_alone:
            return NotImplemented
        activation = activation_of(op, arguments)
        if activation is None:
            return NotImplemented
        if in_place:
            x.lazy.chain = replace(chain, activation=activation)
            return x
        return x.with_values(ChainValues(chain=replace(chain, activation=activation), origin=x.lazy.origin))

    return rule


def _add(in_place: bool) -> Callable[..., Any]:
    def rule(func: OpOverload, x: Tensor, other: Tensor, *, alpha: float = 1) -> Any:
        if not in_place and _pending_chain(x) is None:
            x, other = other, x
        chain = _pending_chain(x)
        if chain is None or not chain.is_norm_alone or alpha != 1 or other is x:
            return NotImplemented
        addend = plain(other)
        if type(addend) is not Tensor or addend.dtype != torch.float32 or addend.device.type != "cpu":
            return NotImplemented
        if addend.shape != x.shape or addend.stride() != x.stride():
            return NotImplemented
        y = chain.plus(addend)  # at once, for the model may modify the addend next
        if in_place and isinstance(x, TensorOfValues):
            x.lazy.set(y)
            return x
        return y

    return rule


def _pad(func: OpOverload, x: TensorOfValues, padding: list[int], value: float = 0.0) -> Any:
    """Zeros around an activation; with the negative padding, the gradient of that."""
    if x.lazy.gradient is not None:
        return _pad_backward(func, x, padding) if any(padding) else _copy_of_gradient(x)
    chain = _pending_chain(x)
    if chain is None or chain.padding is not None or value != 0 or min(padding, default=0) < 0:
        return NotImplemented
    if not any(padding):
        return _clone(func, x)
    like = func(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), padding)
    values = ChainValues(chain=replace(chain, padding=tuple(padding)), origin=x.lazy.origin)
    return x.with_values(values, like)


def _fake_quantize(func: OpOverload, x: Tensor, *arguments: Any) -> Any:
    chain = _pending_chain(x)
    return NotImplemented if chain is None else chain.quantize(*arguments)


def _fake_quantize_with_state(func: OpOverload, x: Tensor, *arguments: Any) -> Any:
    chain = _pending_chain(x)
    if chain is None:
        return NotImplemented
    clips, (scale, offset, invalid), settings = arguments[:4], arguments[4:7], arguments[7:]
    return write_used((*clips, scale, offset), invalid, chain.quantize(*clips, *settings))


# -- backward: the quantiser's gradient computes all of the chain's, which then wait for their nodes


def _fake_quantize_backward(
    func: OpOverload, grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> Any:
    # Values that something has read have other gradients, too; those are summed before the next node, so computing
    # further here would be wasted. With create_graph the values must be those that torch's graph differentiates.
    chain = _pending_chain(x)
    if chain is None or not isinstance(x, TensorOfValues) or torch.is_grad_enabled():
        return NotImplemented
    upstream, values = plain(grad), x.lazy
    if upstream.dtype != torch.float32:
        return NotImplemented
    read_upstream = unchanged(upstream)
    dx, d_weight, d_bias, d_max, d_min = chain.quantized_backward(upstream, clip_max, clip_min, num_bits)

    def compute() -> Tensor:
        return ops.ulq_fake_quantize_backward(read_upstream(), values.get(), clip_max, clip_min, num_bits)[0]

    gradient = ChainGradient(chain, (dx, d_weight, d_bias))
    return x.with_values(ChainValues(gradient=gradient, compute=compute, reads=(values,))), d_max, d_min


def _passed(
    grad: TensorOfValues,
    left: ChainGradient,
    compute: Callable[[], Tensor],
    reads: tuple[ChainValues, ...] = (),
    like: Tensor | None = None,
) -> TensorOfValues:
    """The gradient behind the node that took ``grad``."""
    return grad.with_values(ChainValues(gradient=left, compute=compute, reads=(grad.lazy, *reads)), like)


def _copy_of_gradient(grad: TensorOfValues) -> TensorOfValues:
    values = grad.lazy
    return grad.with_values(
        ChainValues(gradient=values.gradient, compute=lambda: values.get().clone(), reads=(values,))
    )


def _pad_backward(func: OpOverload, grad: TensorOfValues, padding: list[int]) -> Any:
    gradient = grad.lazy.gradient
    if gradient is None or torch.is_grad_enabled() or gradient.chain.padding != tuple(-size for size in padding):
        return NotImplemented
    values, left = grad.lazy, replace(gradient, chain=replace(gradient.chain, padding=None))
    return _passed(grad, left, lambda: func(values.get(), padding), like=gradient.results[0])


def _activation_backward(op: OpOverload) -> Callable[..., Any]:
    def rule(func: OpOverload, grad: Tensor, saved: Tensor, *arguments: float) -> Any:
        of_saved = saved.lazy.chain if isinstance(saved, TensorOfValues) else None
        if of_saved is None or not isinstance(saved, TensorOfValues) or torch.is_grad_enabled():
            return NotImplemented
        values_saved = saved.lazy
        gradient = grad.lazy.gradient if isinstance(grad, TensorOfValues) else None
        if gradient is not None and isinstance(grad, TensorOfValues):
            chain, values = gradient.chain, grad.lazy
            same = of_saved.norm is chain.norm and chain.activation is not None and chain.activation.op is op
            if chain.padding is not None or not same:
                return NotImplemented
            left = replace(gradient, chain=replace(chain, activation=None))
            return _passed(grad, left, lambda: func(values.get(), values_saved.get(), *arguments), (values_saved,))
        activation = activation_of(op, arguments)
        upstream = plain(grad)
        if of_saved.padding is not None or upstream.dtype != torch.float32:
            return NotImplemented
        # The op has saved its input, or its result; another activation function's result is neither.
        if activation is None or of_saved.activation not in (None, activation):
            return NotImplemented
        read_upstream = unchanged(upstream)
        results = BatchNormChain(of_saved.norm, activation).backward(upstream)
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
    if not isinstance(x, TensorOfValues) or x.lazy.value is None or torch.is_grad_enabled():
        return NotImplemented
    gradient = grad.lazy.gradient if isinstance(grad, TensorOfValues) else None
    if gradient is not None:
        norm = gradient.chain.norm
        if not gradient.chain.is_norm_alone or x.lazy.value is not norm.x or training is not norm.training:
            return NotImplemented
        if save_mean is None or save_mean.data_ptr() != norm.mean.data_ptr():
            return NotImplemented  # another BatchNorm on the same input
        results = gradient.results
    elif training and save_mean is not None and save_invstd is not None and grad.dtype == torch.float32:
        results = BatchNormChain(BatchNorm(x.lazy.value, save_mean, save_invstd, weight, None, training)).backward(
            plain(grad)
        )
    else:
        return NotImplemented
    return tuple(result if wanted else None for result, wanted in zip(results, output_mask, strict=True))


RULES: dict[OpOverload, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.clone.default: _clone,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.relu.default: _activation(_aten.relu.default, in_place=False),
    _aten.relu_.default: _activation(_aten.relu.default, in_place=True),
    _aten.hardtanh.default: _activation(_aten.hardtanh.default, in_place=False),
    _aten.hardtanh_.default: _activation(_aten.hardtanh.default, in_place=True),
    _aten.hardswish.default: _activation(_aten.hardswish.default, in_place=False),
    _aten.hardswish_.default: _activation(_aten.hardswish.default, in_place=True),
    _aten.add.Tensor: _add(in_place=False),
    _aten.add_.Tensor: _add(in_place=True),
    _aten.constant_pad_nd.default: _pad,
    _amct.ulq_fake_quantize.default: _fake_quantize,
    _amct.ulq_fake_quantize_.default: _fake_quantize_with_state,
    _amct.ulq_fake_quantize_backward.default: _fake_quantize_backward,
    _aten.threshold_backward.default: _activation_backward(_aten.relu.default),
    _aten.hardtanh_backward.default: _activation_backward(_aten.hardtanh.default),
    _aten.hardswish_backward.default: _activation_backward(_aten.hardswish.default),
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
}
