"""What a compressed layer refers to without registering it, and what else may compute its product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from amct_ext.layers.product_call import Product

if TYPE_CHECKING:
    from amct_ext.layers.activation_quantizer import ActivationQuantizer
    from amct_ext.layers.compressed import CompressedLayer


@dataclass
class UnregisteredRefs:
    """Modules that a layer refers to without registering them: their state belongs elsewhere in the model."""

    shared_act_quant: ActivationQuantizer | None = None  # of the layer that runs first on the shared input
    batch_norm: _BatchNorm | None = None  # that follows, and has fixed statistics in evaluations
    product: Product | None = None  # in the forward of its class, where that is not torch's


class ProductOnCodes(Protocol):
    """Another way to compute a layer's product; `integer.IntegerForward` is the one there is."""

    used: bool | None  # by the last forward

    def __call__(self, layer: CompressedLayer, x: Tensor) -> Tensor | None:
        """The output of the layer, or None where ``x`` is for the float path."""

    def pop_accumulators(self) -> Tensor | None:
        """The int32 accumulators of the last forward, where the layer's shift search needs them; once."""

    def drop_packed_weight(self) -> None:
        """Free the packed weight: the weight may be another one."""
