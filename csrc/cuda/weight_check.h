// Checks shared by the ops that quantise a weight with given scales.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/check.h"

namespace amct_ext::cuda {

// Returns the channel axis counted from the front.
inline std::optional<int64_t> check_scaled_weight(const char* op, const at::Tensor& w, const at::Tensor& scale,
                                                  int64_t num_bits, std::optional<int64_t> axis, int64_t most = 16) {
  check_floating(op, "w", w);
  check_bits(op, num_bits, most);
  if (axis) axis = check_axis(op, "channel_axis", w, *axis);
  check_floating(op, "scale", scale);
  check_scale(op, scale, w, axis);
  check_device(op, "scale", scale, "w", w);
  return axis;
}

}  // namespace amct_ext::cuda
