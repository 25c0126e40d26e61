// Adaptive-range quantisation, for the kernels that make sparse weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace amct_ext::cuda {

// Quantises `source` (dense, not empty) into `y` of the same layout and leaves the scales in `scale`. A defined
// `mask` of the same layout drops weights first.
void range_and_quantize(const at::Tensor& source, const at::Tensor& mask, const at::Tensor& y, const at::Tensor& scale,
                        int num_bits, std::optional<int64_t> channel_axis);

}  // namespace amct_ext::cuda
