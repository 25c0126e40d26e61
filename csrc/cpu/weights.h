// Parts of the weight kernels that the sparse ones share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/kernels.h"

namespace amct_ext::cpu {

double scale_of(Range range, int num_bits, bool wide);

// Adaptive-range quantisation of `source` (no holes, not empty) into `y` of the same layout; `scale` receives the
// scales. `source` and `y` must be different tensors: a step may be quantised again from `source`.
void range_and_quantize(const at::Tensor& source, const at::Tensor& y, const at::Tensor& scale, int num_bits,
                        std::optional<int64_t> channel_axis);

}  // namespace amct_ext::cpu
