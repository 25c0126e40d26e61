"""What the references cost a device without kernels: calls of torch operators, and bytes moved in units of the data.

    python tools/reference_cost.py

Counted, not timed: the references run on meta tensors of a layer of ResNet-50 below a mode that sees every operator.
Views are left out. The unit is one read of the layer's activation (or weight) in float32. `docs/npu.md` has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from amct_ext import backends

ACTIVATION = (32, 256, 56, 56)
WEIGHT = (512, 512, 3, 3)


class Count(TorchDispatchMode):
    """Counts calls and bytes of what is no view; `wide` counts the calls that read or write float64."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = self.wide = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, Tensor)]
        if not func.is_view and tensors:
            self.calls += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            self.wide += any(t.dtype == torch.float64 for t in tensors)
        return result


def samples() -> dict[str, tuple[Any, ...]]:
    """Arguments of each op on a layer, all of them."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w, one, mask = meta(*ACTIVATION), meta(*WEIGHT), meta(), meta(*WEIGHT, dtype=torch.bool)
    scales, step = meta(WEIGHT[0]), meta(dtype=torch.int64)
    errors = meta(ACTIVATION[1], 16, dtype=torch.float64)
    return {
        "ulq_fake_quantize": (x, one, one, one, one, 8, False),
        "ulq_fake_quantize_backward": (x, x, one, one, 8),
        "arq_fake_quantize": (w, 8, 0),
        "lsq_fake_quantize": (w, scales, 8, 0, None),
        "lsq_fake_quantize_backward": (w, w, scales, 8, 0, None),
        "search_weight_scale": (w, 4, 0, None),
        "repair_weight_scale_": (w, scales, 8, 0),
        "sparse_arq_fake_quantize": (w, mask, 8, 0),
        "sparse_arq_fake_quantize_2to4": (w, 1, 8, 0),
        "apply_mask": (w, mask),
        "sr_ste_backward": (w, w, mask, 2e-4),
        "mask_2to4": (w, 1),
        "refresh_mask_": (w, mask, step, 2, 1),
        "search_clip_range": (x, 8, False),
        "shift_error_": (x, meta(ACTIVATION[1]), errors, 1),
        "filter_norms": (w, 0),
    }


def cost(op: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, float, int]:
    """Calls, bytes in units of the first argument, calls with float64."""
    with Count() as count:
        op(*arguments)
    return count.calls, count.bytes / (arguments[0].numel() * arguments[0].element_size()), count.wide


def main() -> None:
    print("| op | torch calls | data moved, reads of the input | of the calls, with float64 |\n|---|---|---|---|")
    for op, arguments in samples().items():
        calls, moved, wide = cost(backends.reference(op), arguments)
        print(f"| `{op}` | {calls} | {moved:.1f} | {wide} |")


if __name__ == "__main__":
    main()
