// The activation op, for the form of it that also writes a quantiser's state.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace amct_ext::cuda {

using at::Tensor;

// The kernel of ulq_fake_quantize; returns y, scale, offset, both effective clips, invalid.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_fake_quantize(const Tensor& x, const Tensor& clip_max,
                                                                             const Tensor& clip_min,
                                                                             const Tensor& prev_clip_max,
                                                                             const Tensor& prev_clip_min,
                                                                             int64_t num_bits, bool fixed_min);

}  // namespace amct_ext::cuda
