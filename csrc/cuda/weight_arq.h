// Adaptive-range quantisation of a weight, shared by the dense and the sparse ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace amct_ext::cuda {

// Room for the scales of a weight: one per channel, or a single one.
at::Tensor empty_scales(const at::Tensor& w, std::optional<int64_t> channel_axis);

// Quantises `source` (dense, not empty) into `y` and writes `scale`. Where `mask` is defined, weights it drops count as
// zero. All but `scale` have the same layout.
void arq_quantize(const at::Tensor& source, const at::Tensor& mask, const at::Tensor& y, const at::Tensor& scale,
                  int num_bits, std::optional<int64_t> channel_axis);

}  // namespace amct_ext::cuda
