// The 2:4 mask of a weight, shared by the ops that apply it at once.
#pragma once

#include <ATen/core/Tensor.h>

namespace amct_ext::cuda {

// Writes the mask of `source` (dense) and, where `y` is defined, the weights that are kept (zero elsewhere). All have
// the same layout. With a defined `step` nothing is written unless `update_freq` makes a refresh due at that step,
// which the kernel reads from device memory.
void make_mask(const at::Tensor& source, int64_t axis, const at::Tensor& mask, const at::Tensor& y,
               const at::Tensor& step = {}, int64_t update_freq = 0);

}  // namespace amct_ext::cuda
