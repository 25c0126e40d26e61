"""What a layer's packed weight is made of, and how it is seen that it changed."""

from __future__ import annotations

from torch import Tensor, nn

from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.products.fingerprint import Fingerprint, fingerprint


def fingerprints(layer: CompressedLayer, samples: int | None, with_bias: bool = False) -> list[Fingerprint]:
    """Fingerprints of the tensors that the compressed weight depends on, and of the bias where it is packed, too.

    A 2:4 mask that does not fit the weight is repaired first.
    """
    assert layer.weight_quant is not None
    sources = [layer.weight, *layer.weight_quant.parameters()]
    if layer.sparsity is not None:
        layer.sparsity.repair_mask(layer.weight)
        sources.append(layer.sparsity.mask)
    if with_bias and layer.bias is not None:
        sources.append(layer.bias)
    return [fingerprint(t, samples) for t in sources]


def fingerprint_samples(layer: CompressedLayer, x: Tensor) -> int | None:
    """How many pieces of a weight to compare with the packed one, so that it takes a fiftieth of the product's time.

    None, all of it, where the product has 4096 output positions or more (an image of 64 x 64) or the weight is small.
    """
    positions = x.numel() // max(x.shape[1 if x.dim() == 4 else -1], 1)
    if isinstance(layer, nn.Conv2d):
        positions //= layer.stride[0] * layer.stride[1]
    size = layer.weight.numel()
    if positions >= 4096 or size <= 4096:
        return None
    # A piece costs as much time as 2^19 / 50 multiplications of the product, about 10,000.
    return max(64, size * max(positions, 16) // 2**19)
