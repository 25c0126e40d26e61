"""Fingerprints of tensors, which also show writes that autograd does not count: those through ``.data``."""

from __future__ import annotations

import torch
from torch import Tensor

Fingerprint = tuple[int, int, int, int]  # id, address, version, hash of the bits


def fingerprint(tensor: Tensor, samples: int | None = None) -> Fingerprint:
    """A value that stays the same while nothing is written to a CPU tensor.

    A write that raises the version always changes it. Another one changes the hash of the bits: of all of them, or of
    ``samples`` pieces of 64 bytes, spread evenly. Then replacing the values is found, writing a few perhaps not.
    """
    from amct_ext import _C

    version = 0 if tensor.is_inference() else tensor._version
    memory = tensor.t() if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
    if not (memory.is_contiguous() or (memory.dim() == 4 and memory.is_contiguous(memory_format=torch.channels_last))):
        memory = memory.contiguous()
    size = memory.numel() * memory.element_size()
    bits = _C.fingerprint(memory.data_ptr(), size, size if samples is None else samples)
    return id(tensor), tensor.data_ptr(), version, bits
