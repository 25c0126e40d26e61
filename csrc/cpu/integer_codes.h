// Memory for 8-bit codes of activations.
#pragma once

#include <c10/util/accumulate.h>

#include <algorithm>

#include "cpu/parallel.h"

namespace amct_ext::cpu {

constexpr int64_t kSlack = 64;  // bytes after the codes that the product may read

// Images channels last, other shapes contiguous.
inline at::Tensor room_for_codes(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t count = c10::multiply_integers(sizes);
  const at::Tensor room = at::empty({count + kSlack}, options.dtype(at::kByte));
  std::fill_n(static_cast<uint8_t*>(room.mutable_data_ptr()) + count, kSlack, uint8_t{0});
  if (sizes.size() != 4) return room.narrow(0, 0, count).view(sizes);
  return room.as_strided(sizes, {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]});
}

}  // namespace amct_ext::cpu
