"""What a compressed layer refers to without registering it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.modules.batchnorm import _BatchNorm

from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.product_call import Product


@dataclass
class UnregisteredRefs:
    """Modules that a layer refers to without registering them: their state belongs elsewhere in the model."""

    shared_act_quant: ActivationQuantizer | None = None  # of the layer that runs first on the shared input
    batch_norm: _BatchNorm | None = None  # that follows, and has fixed statistics in evaluations
    fuse_allowed: bool = True  # the BatchNorm with what follows it
    product: Product | None = None  # in the forward of its class, where that is not torch's

    @property
    def can_fuse(self) -> bool:
        """Whether what follows the layer's product may be computed with it."""
        return self.fuse_allowed and self.batch_norm is not None
