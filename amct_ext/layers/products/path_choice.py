"""Which path a layer's product takes: float, integer or prepared; the one that was asked for, or the fastest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.product_path import ProductPath
from amct_ext.layers.products.integer_forward import IntegerForward
from amct_ext.layers.products.prepared_forward import PreparedForward
from amct_ext.layers.products.timing import fastest


class PathChoice:
    """How one layer computes its product, where another path than floats may be taken.

    ``mode``: "integer", "prepared" or "auto". ``choices``: what was measured, by shape of the input (without its first
    axis), whether gradients were recorded, and the layer's mode. While the model of ``tracker`` is evaluated without
    gradients, results of convolutions are deferred (`DeferredTensor`).
    """

    def __init__(self, mode: str, tracker: ForwardTracker | None = None) -> None:
        self.mode = mode
        self.tracker = ForwardTracker() if tracker is None else tracker
        self.integer = IntegerForward(self.tracker)
        self.prepared = PreparedForward(self.tracker)
        self.choices: dict[tuple[tuple[int, ...], bool, bool], ProductPath] = {}
        self.used: ProductPath = "float"  # by the last forward

    def __call__(self, layer: CompressedLayer, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the float path is to be taken."""
        self.integer.pop_accumulators()
        self.used = self._choose(layer, x)
        if layer.training or torch.is_grad_enabled():
            self.drop_packed_weight()  # it is about to change
        if self.used == "float":
            return None
        return self.prepared(layer, x) if self.used == "prepared" else self.integer(layer, x)

    def pop_accumulators(self) -> Tensor | None:
        """The int32 accumulators of the last forward, where the layer's shift search needs them; once."""
        return self.integer.pop_accumulators()

    def drop_packed_weight(self) -> None:
        """Free the packed weights; the next evaluation packs them again."""
        self.integer.drop_packed_weight()
        self.prepared.drop_packed_weight()

    def _choose(self, layer: CompressedLayer, x: Tensor) -> ProductPath:
        ready = layer.training or layer.ready  # before that an evaluation uses ranges of its own
        paths: list[ProductPath] = []
        if self.mode != "prepared" and ready and self.integer.supports(layer, x):
            paths.append("integer")
        if self.mode != "integer" and ready and self.prepared.supports(layer, x):
            paths.append("prepared")
        if self.mode != "auto" or not paths:
            return paths[0] if paths else "float"
        key = (tuple(x.shape[1:]), torch.is_grad_enabled(), layer.training)
        if key not in self.choices:
            # In its first evaluation the shift search reads the result, which is deferred from then on.
            evaluates = not (layer.training or key[1]) and self.tracker.forward_id is not None
            deferred = evaluates and self.integer.policy.allowed and isinstance(layer, nn.Conv2d)
            self.choices[key] = fastest(layer, x, paths, key[1], deferred)
        return self.choices[key]
