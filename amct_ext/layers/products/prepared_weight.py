"""A weight packed for oneDNN, once for an evaluation, alone or with a BatchNorm folded into it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from amct_ext.layers.bn_fold import fold_batch_norm
from amct_ext.layers.products.fingerprint import Fingerprint, fingerprint
from amct_ext.layers.products.integer_ops import ConvGeometry
from amct_ext.layers.products.prepared_ops import pack_conv_weight


class PackedConv(NamedTuple):
    """What oneDNN multiplies by and adds."""

    weight: Tensor  # opaque
    bias: Tensor | None


class PreparedConvWeight:
    """The fake-quantised weight and the bias of a convolution, packed when they are first used.

    ``weight`` and ``bias`` must not be modified any more. ``input_size``: of the inputs to come.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, groups: int, input_size: torch.Size
    ) -> None:
        self.geometry = geometry
        self.groups = groups
        self._weight = weight
        self._bias = bias
        self._input_size = input_size
        self._plain: PackedConv | None = None
        self._is_finite: bool | None = None
        self._folded: tuple[object, PackedConv | None] | None = None  # key of the BatchNorm

    @property
    def is_finite(self) -> bool:
        """Whether weight and bias hold no NaN and no Inf: oneDNN's activation functions hide a NaN from quantisers."""
        if self._is_finite is None:
            self._is_finite = all(bool(t.isfinite().all()) for t in (self._weight, self._bias) if t is not None)
        return self._is_finite

    def plain(self) -> PackedConv:
        """Packed as it is."""
        if self._plain is None:
            self._plain = self._pack(self._weight, self._bias)
        return self._plain

    def folded(
        self, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> PackedConv | None:
        """Packed with this BatchNorm behind it; None where the result is not finite."""
        key = (eps, *(_fingerprint(t) for t in (gamma, beta, mean, variance)))
        if self._folded is None or self._folded[0] != key:
            factor, shift = fold_batch_norm(self._bias, gamma, beta, mean, variance, eps)
            weight = (self._weight * factor.view(-1, 1, 1, 1)).float()
            finite = bool(weight.isfinite().all()) and bool(shift.isfinite().all())
            self._folded = key, self._pack(weight, shift.float()) if finite else None
            self._plain = None  # of a first evaluation, in which nothing was folded
        return self._folded[1]

    def _pack(self, weight: Tensor, bias: Tensor | None) -> PackedConv:
        return PackedConv(pack_conv_weight(weight, self.geometry, self.groups, self._input_size), bias)


def _fingerprint(tensor: Tensor | None) -> Fingerprint | None:
    return None if tensor is None else fingerprint(tensor)


def is_plain(tensor: Tensor | None) -> bool:
    """Whether the bits of ``tensor`` can be looked at; True where there is none."""
    return tensor is None or (type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu")
