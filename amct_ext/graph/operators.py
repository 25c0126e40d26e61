"""Names of operators that several modules treat alike."""

from __future__ import annotations

# A masked run zeroes removed channels in inputs of PRODUCTS, and drops them in NORMS, STATISTICS and SOFTMAXES between
# channels.
MATRIX_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
ATTENTIONS = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
STATISTICS = ("mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "amax", "amin")
LAYER_NORMS = ("native_layer_norm", "_fused_rms_norm")
GROUP_NORM = "native_group_norm"
SOFTMAXES = ("_softmax", "_log_softmax")
BATCH_NORM_OPS = (
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm",
)  # fmt: skip
PRODUCTS = frozenset((*MATRIX_PRODUCTS, "convolution", *ATTENTIONS))
NORMS = frozenset((*LAYER_NORMS, GROUP_NORM, *BATCH_NORM_OPS))
