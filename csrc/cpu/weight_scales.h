// Given scales of a weight, as its ops use them.
#pragma once

#include <cfloat>
#include <vector>

#include "common/layout.h"
#include "common/quant_math.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {

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
