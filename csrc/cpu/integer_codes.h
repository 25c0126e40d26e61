// Tensors for 8-bit codes of activations.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>

#include <algorithm>

namespace amct_ext::cpu {

constexpr int64_t kReadPadding = 64;  // bytes beyond the codes that the product may read

// Images channels last, other shapes contiguous; zeros in the padding.
inline at::Tensor empty_codes(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t count = c10::multiply_integers(sizes);
  const at::Tensor buffer = at::empty({count + kReadPadding}, options.dtype(at::kByte));
  std::fill_n(static_cast<uint8_t*>(buffer.mutable_data_ptr()) + count, kReadPadding, uint8_t{0});
  if (sizes.size() != 4) return buffer.narrow(0, 0, count).view(sizes);
  return buffer.as_strided(sizes, {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]});
}

}  // namespace amct_ext::cpu
