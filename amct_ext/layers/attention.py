"""nn.MultiheadAttention with its projections as layers, so that they are quantised like any Linear.

The parameters stay where they are, under their names: a projection holds the parameter of the attention, which alone
saves and loads it. Source: Vaswani et al. 2017; arguments, masks and results are those of torch's module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.layers.derive import derived_class, new_derived, take_attributes


class InProjection(nn.Linear):
    """A Linear whose weight and bias are those of the attention around it; state dicts have them there only."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._parameters:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, found, *args)
        held = {prefix + name for name in self._parameters}
        missing_keys += [name for name in found if name not in held]


# Projection -> the parameter that is its weight. Separate ones share one bias, which is added behind them.
_PACKED = {"in_proj": "in_proj_weight"}
_SEPARATE = {"q_proj": "q_proj_weight", "k_proj": "k_proj_weight", "v_proj": "v_proj_weight"}


class SplitAttention(nn.MultiheadAttention):
    """An attention that calls `in_proj` (or q_proj, k_proj, v_proj where it has a weight for each) and `out_proj`."""

    derived_from: tuple[type, type] | None = None  # this class and the user's
    in_proj: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> SplitAttention:
        """Take over the parameters, hooks and settings of a module (which must not be used afterwards)."""
        own = cls if type(module) is nn.MultiheadAttention else derived_class(cls, type(module))
        new: SplitAttention = object.__new__(own)
        take_attributes(new, module)
        for name, weight in new._projections().items():
            rows, columns = getattr(new, weight).shape
            new.add_module(name, InProjection(columns, rows, bias=False, device="meta"))
        new._tie()
        return new.train(module.training)

    def _projections(self) -> dict[str, str]:
        return _SEPARATE if self._parameters["in_proj_weight"] is None else _PACKED

    def _tie(self) -> None:
        """Give the projections the parameters that this module has now."""
        for name, weight in self._projections().items():
            projection = self._modules[name]
            assert projection is not None
            projection._parameters["weight"] = self._parameters[weight]
            if weight == "in_proj_weight":
                projection._parameters["bias"] = self._parameters["in_proj_bias"]

    # -- the forward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the float class; `is_causal` is a hint about `attn_mask`, which is used as it is given."""
        batched = query.dim() == 3
        q, k, v = (self._batch_first(x, batched) for x in self._project(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, bias.expand(x.shape[0], 1, -1)], 1) for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), weights
        return y if self.batch_first else y.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._parameters["in_proj_weight"] is None:
            inputs = ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
            values = [projection(x) for projection, x in inputs]
            bias: Tensor | None = self.in_proj_bias
            if bias is None:
                return tuple(values)
            return tuple(y + own for y, own in zip(values, bias.chunk(3), strict=True))
        if query is key and key is value:
            return tuple(self.in_proj(query).chunk(3, -1))
        return tuple(self.in_proj(x).chunk(3, -1)[place] for place, x in enumerate((query, key, value)))

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """The sum of both masks, (batch or 1, heads or 1, queries or 1, keys).

        Keys appended by bias_k or add_zero_attn are not masked.
        """
        found: Tensor | None = None
        for mask, is_padding in ((attn_mask, False), (key_padding_mask, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
            if is_padding:
                mask = mask.reshape(-1, 1, 1, mask.shape[-1])
            elif mask.dim() == 3:
                mask = mask.unflatten(0, (q.shape[0], self.num_heads))
            mask = F.pad(mask, (0, keys - mask.shape[-1])) if keys > mask.shape[-1] else mask
            found = mask if found is None else found + mask
        return found

    # -- parameters that are exchanged, copies

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply: Callable[..., Self] = super()._apply  # untyped in torch
        result = apply(fn, recurse)
        self._tie()
        return result

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._tie()  # loading by assignment

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copies and pickles derive a user's class again, for no module holds the derived one."""
        if self.derived_from is None:
            return super().__reduce_ex__(protocol)
        get_state: Callable[[], object] = self.__getstate__
        return new_derived, self.derived_from, get_state()
