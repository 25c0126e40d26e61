"""What each op of a forward makes of chain tensors; NotImplemented: the op reads the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amct_ext.layers.chains.backward_rules import add_gradients, backward_of_pad
from amct_ext.layers.chains.batch_norm_chain import BatchNormChain, OpOverload, activation_of, batch_norm
from amct_ext.layers.chains.chain_values import ChainTensorBase, ChainValues, materialize, pending_chain
from amct_ext.ops.activation_ulq import write_used

_aten = torch.ops.aten
_amct = torch.ops.amct_ext


def _alias(func: OpOverload, x: ChainTensorBase) -> ChainTensorBase:
    return x.with_values(x.chain_values)


def _clone(func: OpOverload, x: ChainTensorBase, *, memory_format: torch.memory_format | None = None) -> Any:
    chain = pending_chain(x)
    if chain is None or memory_format not in (None, torch.preserve_format):
        return NotImplemented
    return x.with_values(ChainValues(chain=chain, reads=x.chain_values.reads))


def _batch_norm(func: OpOverload, x: Tensor, *arguments: Any) -> Any:
    if not isinstance(x, ChainTensorBase):
        return NotImplemented
    input_values = x.chain_values
    if input_values.may_be_written or input_values.value is None or not input_values.is_result:
        return NotImplemented
    weight, bias, running_mean, running_var, training, *_ = arguments
    others = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    if any(isinstance(t, ChainTensorBase) or t.dtype != torch.float32 or not t.is_contiguous() for t in others):
        return NotImplemented
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return NotImplemented  # torch computes these in another way
    if x.numel() <= x.shape[1] or (not training and (running_mean is None or running_var is None)):
        return NotImplemented
    norm = batch_norm(input_values.value, *arguments)
    values = ChainValues(chain=BatchNormChain(norm), reads=(input_values,))
    return x.with_values(values), norm.mean, norm.invstd  # by which backward knows the BatchNorm


def _activation(op: OpOverload, in_place: bool) -> Callable[..., Any]:
    def rule(func: OpOverload, x: ChainTensorBase, *arguments: float) -> Any:
        values, chain = x.chain_values, x.chain_values.chain
        if chain is None or not chain.takes_activation or not (values.pending or chain.is_sum):
            return NotImplemented
        activation = activation_of(op, arguments)
        if activation is None or (values.pending and values.may_be_written):
            return NotImplemented
        result = values if in_place else ChainValues(chain=chain, reads=values.reads)
        if values.value is not None:  # a sum that had to be computed at once
            if in_place:
                values.compute_readers()
            result.value = op(values.value, *arguments)
        result.chain = replace(chain, activation=activation)
        return x if in_place else x.with_values(result)

    return rule


def _add(in_place: bool) -> Callable[..., Any]:
    def rule(func: OpOverload, x: Tensor, other: Tensor, *, alpha: float = 1) -> Any:
        if alpha != 1 or other is x:
            return NotImplemented
        if not in_place and (sum_of_gradients := add_gradients(x, other)) is not None:
            return sum_of_gradients
        if not in_place and pending_chain(x) is None:
            x, other = other, x
        chain = pending_chain(x)
        if chain is None or not chain.is_norm_alone or not isinstance(x, ChainTensorBase):
            return NotImplemented
        addend = materialize(other)
        if not x.chain_values.pending:  # the other is an alias
            return NotImplemented
        if type(addend) is not Tensor or addend.dtype != torch.float32 or addend.device.type != "cpu":
            return NotImplemented
        if addend.shape != x.shape or addend.stride() != x.stride():
            return NotImplemented
        values = x.chain_values if in_place else ChainValues(reads=x.chain_values.reads)
        values.chain = chain.plus(addend)
        if isinstance(other, ChainTensorBase) and not other.chain_values.may_be_written:
            values.depend_on(other.chain_values)
        else:
            values.get()  # at once, for the model may modify the addend next
        return x if in_place else x.with_values(values)

    return rule


def _pad(func: OpOverload, x: ChainTensorBase, padding: list[int], value: float = 0.0) -> Any:
    """Zeros around an activation; with the negative padding, the gradient of that."""
    if x.chain_values.gradient is not None:
        return backward_of_pad(func, x, padding)
    chain = pending_chain(x)
    if chain is None or chain.is_sum or chain.padding is not None or value != 0 or min(padding, default=0) < 0:
        return NotImplemented
    if not any(padding):
        return _clone(func, x)
    like = func(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), padding)
    values = ChainValues(chain=replace(chain, padding=tuple(padding)), reads=x.chain_values.reads)
    return x.with_values(values, like)


def _fake_quantize(func: OpOverload, x: Tensor, *arguments: Any) -> Any:
    chain = pending_chain(x)
    return NotImplemented if chain is None or chain.is_sum else chain.quantize(*arguments)


def _fake_quantize_with_state(func: OpOverload, x: Tensor, *arguments: Any) -> Any:
    chain = pending_chain(x)
    if chain is None or chain.is_sum:
        return NotImplemented
    clips, (scale, offset, invalid), settings = arguments[:4], arguments[4:7], arguments[7:]
    return write_used((*clips, scale, offset), invalid, chain.quantize(*clips, *settings))


FORWARD_RULES: dict[OpOverload, Callable[..., Any]] = {
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
}
