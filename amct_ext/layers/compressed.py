"""The base of compressed layers: a float layer whose forward masks and quantises weight and input first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol, Self, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_ext import ops
from amct_ext.common.ranks import full_tensor
from amct_ext.config.plan import LayerPlan
from amct_ext.config.text import SparsePrune
from amct_ext.layers.accumulators import device_accumulators
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.activation.stash import stashed
from amct_ext.layers.activation.types import FakeQuantized
from amct_ext.layers.bn_fold import apply_batch_norm, fold_scale
from amct_ext.layers.chains.chain_tensor import chain_convolutions
from amct_ext.layers.derive import new_derived, take_attributes
from amct_ext.layers.forward_context import state_updates_disabled
from amct_ext.layers.layer_refs import UnregisteredRefs
from amct_ext.layers.product_call import Product
from amct_ext.layers.product_path import ProductPath
from amct_ext.layers.shift_search import ShiftSearch
from amct_ext.layers.weight.quantizer import WeightQuantizer, gradient_factor
from amct_ext.layers.weight.sparsity import Sparsity, masked

_EPS = torch.finfo(torch.float32).eps


class ProductChoice(Protocol):
    """Another path for a layer's product than floats, where one is faster; see `products.path_choice.PathChoice`."""

    used: ProductPath  # by the last forward

    def __call__(self, layer: CompressedLayer, x: Tensor) -> Tensor | None:
        """The output of the layer, or None where ``x`` is for the float path."""

    def pop_accumulators(self) -> Tensor | None:
        """The int32 accumulators of the last forward, where the layer's shift search needs them; once."""

    def drop_packed_weight(self) -> None:
        """Free the packed weight: the weight may be another one."""


class CompressedLayer(nn.Module):
    """What every compressed layer adds to its float class; each child is None where the plan does not ask for it.

    Children: ``sparsity``, ``weight_quant``, ``act_quant`` (None also at a layer that shares another layer's),
    ``search_n``.
    """

    layer_name: str  # at create; a layer that was wrapped since has another one in the model
    refs: UnregisteredRefs
    derived_from: tuple[type, type] | None = None  # compressed and float class, where the latter is a user's
    weight: Tensor  # nn.Parameter of the float class
    bias: Tensor | None
    in_axis = 1  # of the weight: the axis that 2:4 sparsity works along
    channel_axis_out = 1  # of the output
    added_children: tuple[str, ...] = ("sparsity", "weight_quant", "act_quant", "search_n")  # not of the float layer

    sparsity: Sparsity | None
    weight_quant: WeightQuantizer | None
    act_quant: ActivationQuantizer | None
    search_n: ShiftSearch | None
    product_choice: ProductChoice | None  # None: the product is computed on floats

    # -- the forward

    def forward(self, input: Tensor) -> Tensor:
        """As the float class."""
        return self._forward(input)

    def _forward(self, x: Tensor, *args: Any) -> Tensor:
        """The output of the layer; ``args``: further arguments of the float class's forward."""
        y = None if self.product_choice is None else self.product_choice(self, x)
        if y is None:
            y = self._float_forward(x, *args)
        if self.search_n is not None:
            if self.training:
                if not state_updates_disabled():
                    self.search_n.reset()
            elif y.numel() and self.feeds_shift_search:
                accumulators = None if self.product_choice is None else self.product_choice.pop_accumulators()
                self._search_shift(self.search_n, y.detach(), accumulators)
        return y

    def _float_forward(self, x: Tensor, *args: Any) -> Tensor:
        """The float computation on fake-quantised input and weight."""
        quantizer, results = self.input_quantizer, []  # type: ignore[var-annotated]
        quantized, weight = self.quantized_input(x, results), self._compressed(self.source_weight(*args))
        # Only the gradient of the weight reads the input again.
        stashes = quantizer is not None and quantizer.stash and weight.requires_grad
        memory = stashed(quantizer.num_bits, *results[0]) if stashes else nullcontext()  # type: ignore[union-attr]
        with memory, chain_convolutions(quantized, self.refs.can_fuse):
            return self.compute_with_weight(quantized, weight, *args)

    def quantized_input(self, x: Tensor, results: list[FakeQuantized]) -> Tensor:
        """``x`` fake-quantised, where the plan asks for it; ``results`` takes what the quantiser computed."""
        if self.act_quant is not None:
            return self.act_quant(x, results)  # type: ignore[no-any-return]
        return x if self.input_quantizer is None else self.input_quantizer.forward_shared(x, results)

    def compressed_weight(self) -> Tensor:
        """The weight that the product uses: masked and fake-quantised; in training a 2:4 mask may be renewed."""
        return self._compressed(self.source_weight())

    def source_weight(self, *args: Any) -> Tensor:
        """The float weight of the product; ``args``: as of `_forward`, where one is under way."""
        return self.weight

    def _compressed(self, weight: Tensor) -> Tensor:
        if self.weight_quant is None:
            return weight if self.sparsity is None else self.sparsity(weight)
        if self.sparsity is None:
            return self._from_rows(self.weight_quant(self._to_rows(weight)))
        mask = self._to_rows(self.sparsity.mask_for_forward(weight))
        return self._from_rows(self.weight_quant(self._to_rows(weight), mask, self.sparsity.decay))

    def compute_with_weight(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """The computation of the float class with another weight."""
        raise NotImplementedError

    @torch.no_grad()
    def _search_shift(self, search: ShiftSearch, y: Tensor, accumulators: Tensor | None) -> None:
        axis = (self.channel_axis_out if y.dim() > 1 else 0) % y.dim()
        deq_scale = self.deq_scale()
        norm = self.refs.batch_norm
        if accumulators is not None:
            assert self.weight_quant is not None
            w_scale = self.weight_quant.last_scale()
            steps = device_accumulators(accumulators, self.bias, norm, w_scale, deq_scale, axis)
            search.observe(steps, deq_scale, axis, in_steps=True)
            return
        search.observe(y if norm is None else apply_batch_norm(y, norm), deq_scale, axis)

    # -- how far the state is

    @property
    def input_quantizer(self) -> ActivationQuantizer | None:
        """The quantiser of the input: its own, or that of the layer it shares the input with."""
        return self.act_quant if self.act_quant is not None else self.refs.shared_act_quant

    @property
    def own_quantizers(self) -> tuple[ActivationQuantizer, ...]:
        """The activation quantisers that are registered at this layer."""
        return () if self.act_quant is None else (self.act_quant,)

    @property
    def weight_quantizers(self) -> tuple[WeightQuantizer, ...]:
        """The quantisers of the layer's weights."""
        return () if self.weight_quant is None else (self.weight_quant,)

    @property
    def ready(self) -> bool:
        """Whether clips and learned scales are set: what the layer computes follows from its state."""
        quantizers = (self.input_quantizer, *self.own_quantizers)
        return all(q is None or q.ready for q in quantizers) and all(q.ready for q in self.weight_quantizers)

    @property
    def recordable(self) -> bool:
        """Whether there are factors to record."""
        return all(q is None or q.recordable for q in (self.input_quantizer, *self.own_quantizers))

    @property
    def feeds_shift_search(self) -> bool:
        """Whether a forward's output goes to the shift search: not in a compiled graph, for it decides on the host."""
        if torch.compiler.is_compiling() or self.search_n is None or self.training or not self.search_n.needs_data:
            return False
        quantizer = self.input_quantizer
        if quantizer is None or quantizer.tracker.calibrating or quantizer.tracker.training:
            return False
        return not state_updates_disabled() and not self.weight.is_meta and self.ready

    # -- what is recorded and saved

    @torch.no_grad()
    def masked_weight(self) -> Tensor:
        """The float weight with the current 2:4 mask folded in."""
        weight = full_tensor(self.source_weight().detach())
        if self.sparsity is None:
            return weight
        self.sparsity.repair_mask(weight)
        return ops.apply_mask(weight, self.sparsity.mask)

    @torch.no_grad()
    def recorded_scale_w(self) -> Tensor:
        """scale_w as recorded: current scales (1 below FLT_EPSILON), times the factor of a BatchNorm that follows."""
        assert self.weight_quant is not None, self.layer_name
        scale = self.weight_quant.current_scale(self._to_rows(self.masked_weight()))
        scale = torch.where(scale < _EPS, torch.ones_like(scale), scale)
        norm = self.refs.batch_norm
        return scale if norm is None else fold_scale(scale, norm)

    @torch.no_grad()
    def deq_scale(self) -> Tensor:
        """scale_d * scale_w of the current state, on the device."""
        assert self.input_quantizer is not None, self.layer_name
        return self.input_quantizer.current_scale() * self.recorded_scale_w()

    # -- construction

    @classmethod
    def from_float(
        cls, layer: nn.Module, plan: LayerPlan, batch_num: int, fixed_min: bool, product: Product | None = None
    ) -> CompressedLayer:
        """Take over the float layer's parameters, hooks and settings (the float object must not be used afterwards)."""
        new = object.__new__(cls)
        take_attributes(new, layer)
        new.layer_name = plan.name
        new.refs = UnregisteredRefs(product=product)
        new.product_choice = None
        vars(new).update(dict.fromkeys(cls.added_children))
        new._add_children(plan, batch_num, fixed_min)
        return new.train(layer.training)

    def _add_children(self, plan: LayerPlan, batch_num: int, fixed_min: bool) -> None:
        weight = self.weight
        if isinstance(plan.prune, SparsePrune):
            decay = plan.prune.decay if plan.prune.mask_gradient == "SR_STE" else None
            self.sparsity = Sparsity(weight, self.in_axis, plan.prune.update_freq, decay)
        if plan.quant is not None:
            wts = plan.quant.weight
            self.act_quant = ActivationQuantizer(plan.quant.data, fixed_min, batch_num, plan.name, weight.device)
            rows = self._to_rows(self.masked_weight())
            self.weight_quant = WeightQuantizer(wts, rows, 0, gradient_factor(rows, wts))
            self.search_n = ShiftSearch(self.weight_quant.scale.numel(), batch_num, weight.device)

    def share_act_quant(self, owner: CompressedLayer) -> None:
        """Use the quantiser of ``owner``, which runs first on the same tensor."""
        assert owner.act_quant is not None
        self.act_quant = None
        self.refs.shared_act_quant = owner.act_quant
        owner.act_quant.num_readers += 1

    def set_batch_norm(self, norm: nn.Module | None) -> None:
        """Remember the BatchNorm that follows (None: none does): its factor belongs to the recorded weight scales."""
        assert norm is None or isinstance(norm, _BatchNorm)
        self.refs.batch_norm = norm
        search = self.search_n
        if search is None or self.weight_quant is None:
            return
        per_scale = self.weight_quant.scale if norm is None else norm.running_var
        assert per_scale is not None
        if search.errors.shape[0] != per_scale.numel():
            search = ShiftSearch(per_scale.numel(), search.batch_num, search.errors.device)
            self.search_n = search.train(self.training)

    @torch.no_grad()
    def initialize_scales(self) -> None:
        """Set learned scales that no training forward has set yet, from the weight."""
        if self.weight_quant is not None:
            self.weight_quant.initialize(self._to_rows(self.masked_weight()))

    @torch.no_grad()
    def repair_scales(self) -> None:
        """Before the state is taken: set back learned scales as the next forward would.

        Not where the weight is sharded, for no rank holds it; nor where the scale was loaded and not trained since.
        """
        if not any(quantizer.learned for quantizer in self.weight_quantizers):
            return
        for quantizer, weight in zip(self.weight_quantizers, self._weights_to_quantize(), strict=True):
            if quantizer.learned and not weight.is_meta and not hasattr(weight, "full_tensor"):
                mask = None if self.sparsity is None else self.sparsity.mask
                quantizer.repair_for_state(self._to_rows(masked(weight, mask)))

    def _weights_to_quantize(self) -> tuple[Tensor, ...]:
        """The weights of `weight_quantizers`."""
        return () if self.weight_quant is None else (self.source_weight(),)

    def train(self, mode: bool = True) -> Self:
        """As of nn.Module; a change of mode is also where weights may have been swapped through ``weight.data``."""
        if self.product_choice is not None:
            self.product_choice.drop_packed_weight()
        return super().train(mode)

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Keeps the ``__init_subclass__`` of a user's class from seeing the class that is derived from it."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copies and pickles derive a user's class again, for no module holds the derived one."""
        if self.derived_from is None:
            return super().__reduce_ex__(protocol)
        get_state: Callable[[], object] = self.__getstate__
        return new_derived, self.derived_from, get_state()

    def _to_rows(self, weight: Tensor) -> Tensor:
        """The weight with its output channels on axis 0."""
        return weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `_to_rows`."""
        return rows
