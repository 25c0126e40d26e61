// What the ops on weights with given scales share.
#pragma once

#include <cfloat>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "common/quant_math.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {

// Checks weight, bits and axis of an op; returns the channel axis counted from the front.
inline std::optional<int64_t> check_weight(const char* op, const at::Tensor& w, int64_t num_bits,
                                           std::optional<int64_t> channel_axis, int64_t max_bits = 16) {
  check_floating(op, "w", w);
  check_bits(op, num_bits, max_bits);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  return channel_axis;
}

// A scale of at least FLT_EPSILON, in the arithmetic type of w.
inline double floor_scale(double scale, const at::Tensor& w) {
  return is_double(w) ? math::at_least(scale, static_cast<double>(FLT_EPSILON))
                      : static_cast<double>(math::at_least(static_cast<float>(scale), FLT_EPSILON));
}

inline std::vector<double> floored_scales(const at::Tensor& scale, const at::Tensor& w) {
  std::vector<double> values(scale.numel());
  const at::Tensor flat = scale.contiguous();
  for (size_t i = 0; i < values.size(); ++i) values[i] = floor_scale(value_at(flat, static_cast<int64_t>(i)), w);
  return values;
}

}  // namespace amct_ext::cpu
