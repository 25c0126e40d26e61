"""Print, as JSON, a hash of the results of every op's sample calls: `python tests/support/ops/result_bits.py`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.ops.arguments import arguments

from amct_ext import ops


def bits(op: str) -> list[str]:
    """One hash for each sample call: of the results, and of arguments that the op wrote to."""
    torch.manual_seed(0)
    hashes = []
    for call in arguments(op, torch.device("cpu")):
        with torch.no_grad():
            results = getattr(torch.ops.amct_ext, op)(*call)
        digest = hashlib.sha256()
        for tensor in tree_leaves((results, call)):
            if isinstance(tensor, Tensor):
                digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


if __name__ == "__main__":
    print(json.dumps({op: bits(op) for op in ops.__all__}))
