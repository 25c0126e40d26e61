"""The ops, each a documented function over `torch.ops.amct_ext`.

Schemas stand in `csrc/ops.cpp`. Every op has a plain-torch reference here, registered for all devices: it specifies the
op, serves devices without a kernel and checks the kernels.
"""

from amct_ext import _library, backends

_library.load()

from amct_ext.ops import shapes  # noqa: E402, F401  (registers what tracers ask)
from amct_ext.ops.activation_ulq import ulq_fake_quantize, ulq_fake_quantize_, ulq_fake_quantize_backward  # noqa: E402
from amct_ext.ops.calibration_histogram import range_histogram_, search_clip_range_histogram  # noqa: E402
from amct_ext.ops.calibration_search import search_clip_range  # noqa: E402
from amct_ext.ops.calibration_shift import best_shift, shift_error_  # noqa: E402
from amct_ext.ops.integer_accumulators import integer_conv2d_accumulators, integer_linear_accumulators  # noqa: E402
from amct_ext.ops.integer_codes import pack_weight, ulq_quantize  # noqa: E402
from amct_ext.ops.integer_product import integer_conv2d, integer_conv2d_codes, integer_linear  # noqa: E402
from amct_ext.ops.sparsity_mask import mask_2to4, pack_mask, refresh_mask_, unpack_mask  # noqa: E402
from amct_ext.ops.sparsity_weight import (  # noqa: E402
    apply_mask,
    sparse_arq_fake_quantize,
    sparse_arq_fake_quantize_2to4,
    sparsify_2to4,
)
from amct_ext.ops.weight_arq import arq_fake_quantize, arq_fake_quantize_many  # noqa: E402
from amct_ext.ops.weight_lsq import lsq_fake_quantize, lsq_fake_quantize_backward  # noqa: E402
from amct_ext.ops.weight_norms import filter_norms  # noqa: E402
from amct_ext.ops.weight_quantize import quantize_weight  # noqa: E402

backends.load()  # after the schemas and references, which other packages' kernels build on

__all__ = [
    "apply_mask",
    "arq_fake_quantize",
    "arq_fake_quantize_many",
    "best_shift",
    "filter_norms",
    "integer_conv2d",
    "integer_conv2d_accumulators",
    "integer_conv2d_codes",
    "integer_linear",
    "integer_linear_accumulators",
    "lsq_fake_quantize",
    "lsq_fake_quantize_backward",
    "mask_2to4",
    "pack_mask",
    "pack_weight",
    "quantize_weight",
    "range_histogram_",
    "refresh_mask_",
    "search_clip_range",
    "search_clip_range_histogram",
    "shift_error_",
    "sparse_arq_fake_quantize",
    "sparse_arq_fake_quantize_2to4",
    "sparsify_2to4",
    "ulq_fake_quantize",
    "ulq_fake_quantize_",
    "ulq_fake_quantize_backward",
    "ulq_quantize",
    "unpack_mask",
]
