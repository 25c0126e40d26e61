"""Sample calls of every op, and which ops have a CUDA kernel."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import calibration_histogram as histogram

_CUDA = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
# The ops that csrc/cuda registers a kernel of; the others stay on the references.
WITH_CUDA_KERNEL = sorted(
    {name for path in _CUDA.glob("*.cu") for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())}
)


def arguments(op: str, device: torch.device) -> list[tuple[object, ...]]:
    """Sample calls of an op, with gradients asked for where it has them."""
    w = torch.randn(6, 8, 3, 3, device=device)
    grad = torch.randn_like(w)
    scales = torch.full((6,), 0.01, device=device)
    high, low, none = (torch.tensor(v, device=device) for v in (1.5, -1.2, math.nan))
    mask = w > 0
    errors = torch.zeros(8, 16, dtype=torch.float64, device=device)
    gathered = torch.zeros(histogram.BINS, 2, dtype=torch.int64, device=device), torch.zeros(2, 5, device=device)
    ops.range_histogram_(w, *gathered)
    signed = torch.zeros(2, histogram.BINS, 2, dtype=torch.int64, device=device), torch.zeros(2, 5, device=device)
    ops.range_histogram_(w, *signed)

    codes, pixels = (torch.randint(0, 256, n, device=device, dtype=torch.uint8) for n in ((5, 8), (2, 8, 6, 5)))
    scale, offset = (torch.tensor(v, device=device) for v in (0.02, -7.0))
    plain, addend = ((1, 1), (1, 1), (1, 1)), torch.ones(2, 6, 6, 5, device=device)
    matrix, filters = ops.pack_weight(w[:, :, 0, 0], scales), ops.pack_weight(w, scales)

    norm = (w, *(torch.rand(8, device=device) + 0.5 for _ in range(3)), torch.zeros(8, device=device))
    relu6, hardswish = ("none", 0.0, 6.0), ("hardswish", None, None)

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    def state() -> tuple[Tensor, ...]:
        return none.clone(), none.clone(), torch.tensor(False, device=device)

    return {
        "ulq_fake_quantize": [
            (leaf(w), leaf(high), leaf(low), none, none),
            (leaf(w), leaf(high), leaf(low), none, none, 4, True),
            (leaf(w[:, ::2]), high, low, none, none),
            (leaf(w.bfloat16()), leaf(high), leaf(low), none, none),
        ],
        "ulq_fake_quantize_": [
            (leaf(w), leaf(high), leaf(low), none.clone(), none.clone(), *state()),
            (leaf(w.half()), high.clone(), low.clone(), none.clone(), none.clone(), *state(), 4, True),
        ],
        "ulq_fake_quantize_backward": [
            (grad, w, high, low),
            (grad, w, high, low, 4),
            (grad, w.bfloat16(), high, low),
            (grad.half(), w, high, low),
            (grad.double(), w, high, low),
        ],
        "ulq_clip_gradients": [(grad, w, high, low), (grad, w[:, ::2].repeat(1, 2, 1, 1), high, low, 4)],
        "ulq_relu_backward": [
            (grad, w.relu(), None, high, low),
            (grad, w.relu(), scales[:, None, None, None] * w, high, low, 4),
        ],
        "batch_norm_statistics_": [
            (w, norm[1].clone(), norm[2].clone(), 0.1, 1e-5),
            (w[:, :, 0, 0], None, None, 0.1, 1e-5),
        ],
        "batch_norm_activation": [(*norm, *relu6), (*norm[:3], None, None, *hardswish), (*norm, *relu6, grad)],
        "batch_norm_activation_backward": [(grad, *norm, *relu6), (grad, *norm[:3], None, None, *hardswish, False)],
        "batch_norm_ulq": [
            (*norm, *relu6, high, low, none, none),
            (*norm[:3], None, None, *hardswish, high, low, none, none, 4, True),
        ],
        "batch_norm_ulq_backward": [
            (grad, *norm, *relu6, high, low),
            (grad, *norm[:3], None, None, *hardswish, high, low, 4, False),
        ],
        "ulq_quantize": [(w, high, low, none, none), (w[0, 0], high, low, none, none, 4, True)],
        "pack_weight": [(w, scales), (w[:, :, 0, 0], scales[:1], 4)],
        "integer_conv2d": [
            (pixels, scale, offset, *filters, scales, None, (3, 3)),
            (pixels, scale, offset, *filters, scales, scales, (3, 3), (2, 1), (1, 1), (1, 2), True),
            (pixels, scale, offset, *filters, scales, None, (3, 3), *plain, True, addend, 0.0, 6.0),
        ],
        "integer_conv2d_codes": [
            (pixels, scale, offset, *filters, scales, None, (3, 3), *plain, 0.0, None, high, low, none, none),
        ],
        "integer_linear": [(codes, scale, offset, *matrix, scales), (codes, scale, offset, *matrix, scales, scales)],
        "integer_conv2d_accumulators": [
            (pixels, offset, *filters, (3, 3)),
            (pixels, offset, *filters, (3, 3), (2, 1), (1, 1), (1, 2)),
        ],
        "integer_linear_accumulators": [(codes, offset, *matrix)],
        "search_clip_range": [(w,), (w, 4, True)],
        "range_histogram_": [(w, *gathered), (w.half(), *gathered), (w, *signed)],
        "search_clip_range_histogram": [gathered, (*gathered, 4), signed],
        "search_clip_range_wide": [signed, (*signed, 4, True)],
        "percentile_clip_range": [signed, (*signed, 95.0, 4, True)],
        "arq_fake_quantize": [(leaf(w),), (leaf(w), 8, 0), (leaf(w), 4, 1)],
        "lsq_fake_quantize": [(leaf(w), leaf(scales), 8, 0), (leaf(w), leaf(scales[:1]), 8, None, 0.5)],
        "lsq_fake_quantize_backward": [(grad, w, scales, 8, 0), (grad, w.half(), scales[:1], 8, None, 0.5)],
        "quantize_weight": [(w, scales, 8, 0), (w, scales[:1], 4)],
        "search_weight_scale": [(w,), (w, 4, 0), (w, 4, 1, mask)],
        "repair_weight_scale_": [(w, -scales, 8, 0), (w.half(), scales[:1].clone(), 4)],
        "arq_fake_quantize_many": [([leaf(w), leaf(w[0])], 8, [0, -1])],
        "apply_mask": [(leaf(w), mask)],
        "sparsify_2to4": [(leaf(w),)],
        "sparse_arq_fake_quantize": [(leaf(w), mask, 8, 0), (leaf(w), mask)],
        "sparse_arq_fake_quantize_2to4": [(leaf(w), 1, 8, 0), (leaf(w), 0, 4)],
        "apply_mask_sr_ste": [(leaf(w), mask), (leaf(w), mask, 0.1)],
        "sparse_arq_fake_quantize_sr_ste": [(leaf(w), mask, 8, 0), (leaf(w), mask, 4, None, 0.1)],
        "sr_ste_backward": [(grad, w, mask), (leaf(grad), leaf(w), mask, 0.1)],
        "mask_2to4": [(w,), (w, 0)],
        "refresh_mask_": [(w, mask.clone(), torch.tensor(s, device=device), 2) for s in (0, 1)],
        "pack_mask": [(mask,)],
        "unpack_mask": [(ops.pack_mask(mask), list(mask.shape))],
        "filter_norms": [(w,), (w, 1)],
        "shift_error_": [(w, scales[:1], errors.clone()), (w, scales, errors[:6].clone(), 0)],
        "best_shift": [(errors,)],
    }[op]
