// Making 2:4 masks, for the kernels of sparse weights.
#pragma once

#include <ATen/core/Tensor.h>

namespace amct_ext::cuda {

// The mask of `source` (dense) into `mask` and, where it is defined, what is kept into `y`; all of one layout. With
// a defined `step` only where that counter, read on the device, says so.
void make_mask(const at::Tensor& source, int64_t axis, const at::Tensor& mask, const at::Tensor& y,
               const at::Tensor& step = {}, int64_t update_freq = 0);

}  // namespace amct_ext::cuda
