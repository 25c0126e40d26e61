"""Compressed layers: subclasses of the float layers that mask and quantise on the way to the same computation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.common.ranks import whole
from amct_ext.config.plan import LayerPlan, SparsePrune
from amct_ext.layers.accumulators import device_accumulators
from amct_ext.layers.activation_quantizer import ActivationQuantizer
from amct_ext.layers.bn_fold import fold_scale
from amct_ext.layers.derive import new_derived, take_attributes
from amct_ext.layers.forward_context import state_updates_disabled
from amct_ext.layers.integer import IntegerForward
from amct_ext.layers.shift_search import ShiftSearch
from amct_ext.layers.sparsity import Sparsity
from amct_ext.layers.stash import stashed
from amct_ext.layers.weight_quantizer import WeightQuantizer

_EPS = torch.finfo(torch.float32).eps


@dataclass
class UnregisteredRefs:
    """Modules that a layer refers to without holding them: their state belongs elsewhere in the model."""

    shared_act_quant: ActivationQuantizer | None = None  # of the layer that runs first on the shared input
    batch_norm: Any = None  # the BatchNorm that follows


class CompressedLayer(nn.Module):
    """What every compressed layer adds to its float class; each child is None where the plan does not ask for it.

    Children: ``sparsity``, ``weight_quant``, ``act_quant`` (None also at a layer that shares another layer's),
    ``search_n``.
    """

    layer_name: str  # at create; the layer may be wrapped and so get another one
    refs: UnregisteredRefs
    derived_from: tuple[type, type] | None = None  # compressed and float class, where the latter is a user's
    weight: Any  # nn.Parameter of the float class
    bias: Any
    in_axis = 1  # of the weight: the axis that 2:4 sparsity works along
    channel_axis_out = 1  # of the output
    own_children: tuple[str, ...] = ("sparsity", "weight_quant", "act_quant", "search_n")  # not of the float layer

    sparsity: Sparsity | None
    weight_quant: WeightQuantizer | None
    act_quant: ActivationQuantizer | None
    search_n: ShiftSearch | None
    integer: IntegerForward | None  # None: the product is computed on floats

    def __init_subclass__(cls, **arguments: Any) -> None:
        """A user's class is not told of the compressed class that is derived from it."""

    @classmethod
    def from_float(cls, layer: nn.Module, plan: LayerPlan, batch_num: int, fixed_min: bool) -> CompressedLayer:
        """Take over the float layer's parameters, hooks and settings (the float object must not be used afterwards)."""
        new = object.__new__(cls)
        take_attributes(new, layer)
        new.layer_name = plan.name
        new.refs = UnregisteredRefs()
        new.integer = None
        vars(new).update(dict.fromkeys(cls.own_children))
        new._add_children(plan, batch_num, fixed_min)
        return new.train(layer.training)

    def _add_children(self, plan: LayerPlan, batch_num: int, fixed_min: bool) -> None:
        weight = self.weight
        if isinstance(plan.prune, SparsePrune):
            self.sparsity = Sparsity(weight, self.in_axis, plan.prune.update_freq)
        if plan.quant is not None:
            wts = plan.quant.weight
            self.act_quant = ActivationQuantizer(plan.quant.data, fixed_min, batch_num, plan.name, weight.device)
            self.weight_quant = WeightQuantizer(
                wts, self._to_rows(self.masked_weight()), 0, self._grad_factor(wts.num_bits, wts.channel_wise)
            )
            self.search_n = ShiftSearch(self.weight_quant.scale.numel(), batch_num, weight.device)

    # -- links

    def share_act_quant(self, owner: CompressedLayer) -> None:
        """Use the quantiser of ``owner``, which runs first on the same tensor."""
        assert owner.act_quant is not None
        self.act_quant = None
        self.refs.shared_act_quant = owner.act_quant
        owner.act_quant.num_readers += 1

    def set_batch_norm(self, norm: Any) -> None:
        """Remember the BatchNorm that follows (None: none does): its factor belongs to the recorded weight scales."""
        self.refs.batch_norm = norm
        search = self.search_n
        if search is None or self.weight_quant is None:
            return
        scales = (self.weight_quant.scale if norm is None else norm.running_var).numel()
        if search.errors.shape[0] != scales:
            self.search_n = ShiftSearch(scales, search.batch_num, search.errors.device).train(self.training)

    @property
    def activation(self) -> ActivationQuantizer | None:
        """The activation quantiser in use: its own or the shared one."""
        return self.act_quant if self.act_quant is not None else self.refs.shared_act_quant

    @property
    def own_quantizers(self) -> tuple[ActivationQuantizer, ...]:
        """The activation quantisers that are registered at this layer."""
        return () if self.act_quant is None else (self.act_quant,)

    # -- the forward

    def train(self, mode: bool = True) -> Self:
        """As of nn.Module; a change of phase is also where weights may have been swapped through ``weight.data``."""
        if self.integer is not None:
            self.integer.drop_packed_weight()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """As the float class."""
        return self._forward(input)

    def _forward(self, x: Tensor, *args: Any) -> Tensor:
        y = None if self.integer is None else self.integer(self, x)
        if y is None:
            y = self._float_forward(x, *args)
        if self.search_n is not None:
            if self.training:
                if not state_updates_disabled():
                    self.search_n.reset()
            elif y.numel() and self.feeds_shift_search:
                sums = None if self.integer is None else self.integer.pop_accumulators()
                self._search_shift(self.search_n, y.detach(), sums)
        return y

    @property
    def feeds_shift_search(self) -> bool:
        """Whether a forward's output is for the shift search, too; those of compiled graphs are not.

        The search decides on the host and would be traced once a layer, in a graph of its own.
        """
        if torch.compiler.is_compiling() or self.search_n is None or self.training or not self.search_n.needs_data:
            return False
        if self.activation is None or self.activation.tracker.calibrating or self.activation.tracker.training:
            return False
        return not state_updates_disabled() and not self.weight.is_meta and self.ready

    @property
    def ready(self) -> bool:
        """Whether ranges and learned scales have begun: what the layer computes follows from its state."""
        quantizers = (self.activation, *self.own_quantizers)
        return all(q is None or q.ready for q in quantizers) and all(q.ready for q in self.weight_quantizers)

    @property
    def recordable(self) -> bool:
        """Whether there are factors to record."""
        return all(q is None or q.recordable for q in (self.activation, *self.own_quantizers))

    @property
    def weight_quantizers(self) -> tuple[WeightQuantizer, ...]:
        """The quantisers of the layer's weights."""
        return () if self.weight_quant is None else (self.weight_quant,)

    @torch.no_grad()
    def initialise_scales(self) -> None:
        """Start learned scales that no training forward has started yet."""
        if self.weight_quant is not None:
            self.weight_quant.initialise(self._to_rows(self.masked_weight()))

    def _float_forward(self, x: Tensor, *args: Any) -> Tensor:
        quantizer, quantised = self.activation, x
        used: list[Tensor] = []
        if self.act_quant is not None:
            quantised = self.act_quant(x, used)
        elif quantizer is not None:
            quantised = quantizer.reuse(x, used)
        weight = self._compressed_weight()
        # Only the gradient of the weight reads the input again.
        if quantizer is not None and quantizer.stash and weight.requires_grad:
            with stashed(quantizer.num_bits, *used):
                return self._compute(quantised, weight, *args)
        return self._compute(quantised, weight, *args)

    def _compute(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, self.bias)  # type: ignore[operator]
        return y

    def _compressed_weight(self) -> Tensor:
        weight: Tensor = self.weight
        if self.weight_quant is None:
            return weight if self.sparsity is None else self.sparsity(weight)
        mask = None if self.sparsity is None else self._to_rows(self.sparsity.mask_for_forward(weight))
        return self._from_rows(self.weight_quant(self._to_rows(weight), mask))

    def apply_batch_norm(self, y: Tensor) -> Tensor:
        """``y`` after the BatchNorm that follows the layer, by its running statistics; as it is where none follows."""
        norm = self.refs.batch_norm
        if norm is None:
            return y
        weight, bias = (p if p is None else whole(p) for p in (norm.weight, norm.bias))
        return F.batch_norm(y, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)

    @torch.no_grad()
    def _search_shift(self, search: ShiftSearch, y: Tensor, sums: Tensor | None) -> None:
        axis = (self.channel_axis_out if y.dim() > 1 else 0) % y.dim()
        deq_scale = self.deq_scale()
        if sums is not None:
            search.observe(device_accumulators(self, sums, deq_scale, axis), deq_scale, axis, in_steps=True)
            return
        search.observe(self.apply_batch_norm(y), deq_scale, axis)

    # -- what is recorded and saved

    @torch.no_grad()
    def masked_weight(self) -> Tensor:
        """The float weight with the present 2:4 mask folded in."""
        weight = whole(self.weight.detach())
        if self.sparsity is None:
            return weight
        self.sparsity.check(weight)
        return ops.apply_mask(weight, self.sparsity.mask)

    @torch.no_grad()
    def recorded_scale_w(self) -> Tensor:
        """scale_w as recorded: present scales (1 below FLT_EPSILON), times the factor of a BatchNorm that follows."""
        assert self.weight_quant is not None, self.layer_name
        scale = self.weight_quant.current_scale(self._to_rows(self.masked_weight()))
        scale = torch.where(scale < _EPS, torch.ones_like(scale), scale)
        norm = self.refs.batch_norm
        return scale if norm is None else fold_scale(scale, norm)

    @torch.no_grad()
    def deq_scale(self) -> Tensor:
        """scale_d * scale_w of the present state, on the device."""
        assert self.activation is not None, self.layer_name
        return self.activation.current_scale() * self.recorded_scale_w()

    # -- layouts

    def _to_rows(self, weight: Tensor) -> Tensor:
        """The weight with its output channels on axis 0."""
        return weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows

    def _grad_factor(self, num_bits: int, channel_wise: bool) -> float:
        rows = self._to_rows(self.weight)
        # AMCT counts one filter for 2-D and 4-D weights also per tensor, but only the input channels for other ranks.
        count = rows[0].numel() if channel_wise or rows.dim() in (2, 4) else rows.shape[1]
        return 1.0 / math.sqrt(count * (2 ** (num_bits - 1) - 1))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """No module holds a derived class: copies and pickles derive it again."""
        if self.derived_from is None:
            return super().__reduce_ex__(protocol)
        return new_derived, self.derived_from, self.__getstate__()


class CompressedConv1d(CompressedLayer, nn.Conv1d):
    pass


class CompressedConv2d(CompressedLayer, nn.Conv2d):
    pass


class CompressedConv3d(CompressedLayer, nn.Conv3d):
    pass


class CompressedLinear(CompressedLayer, nn.Linear):
    channel_axis_out = -1

    def _compute(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        return F.linear(x, weight, self.bias)


class _CompressedConvTranspose(CompressedLayer):
    in_axis = 0
    groups: Any
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the float class."""
        return self._forward(input, output_size)

    def _to_rows(self, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return weight.transpose(0, 1)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _from_rows(self, rows: Tensor) -> Tensor:
        if self.groups == 1:
            return rows.transpose(0, 1)
        return rows.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _compute(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        dims = len(self.kernel_size)
        output_size = args[0] if args else None
        extra = self._output_padding(  # type: ignore[operator]
            x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        conv: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        y: Tensor = conv(x, weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)
        return y


class CompressedConvTranspose1d(_CompressedConvTranspose, nn.ConvTranspose1d):
    pass


class CompressedConvTranspose2d(_CompressedConvTranspose, nn.ConvTranspose2d):
    pass
