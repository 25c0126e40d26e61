// Checks of the ops on weights, for every device that has kernels of them. Axes are returned counted from the front.
#pragma once

#include <vector>

#include "common/check.h"

namespace amct_ext {

inline std::optional<int64_t> check_weight(const char* op, const at::Tensor& w, int64_t num_bits,
                                           std::optional<int64_t> channel_axis, int64_t max_bits = 16) {
  check_floating(op, "w", w);
  check_bits(op, num_bits, max_bits);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  return channel_axis;
}

// A weight with given scales.
inline std::optional<int64_t> check_scaled_weight(const char* op, const at::Tensor& w, const at::Tensor& scale,
                                                  int64_t num_bits, std::optional<int64_t> channel_axis,
                                                  int64_t max_bits = 16) {
  channel_axis = check_weight(op, w, num_bits, channel_axis, max_bits);
  check_floating(op, "scale", scale);
  check_scale(op, scale, w, channel_axis);
  check_device(op, "scale", scale, "w", w);
  return channel_axis;
}

// The weights of arq_fake_quantize_many; returns an axis for each, none where -1 was given.
inline std::vector<std::optional<int64_t>> check_weights(const char* op, at::TensorList weights, int64_t num_bits,
                                                         at::IntArrayRef channel_axes) {
  check_bits(op, num_bits);
  TORCH_CHECK_VALUE(channel_axes.size() == weights.size(), op,
                    ": channel_axes must hold one axis (-1 for none) for each of ", weights.size(), " weights, not ",
                    channel_axes.size());
  std::vector<std::optional<int64_t>> axes(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    check_floating(op, "a weight", weights[i]);
    check_device(op, "a weight", weights[i], "the others", weights[0]);
    if (channel_axes[i] == -1) continue;
    TORCH_CHECK_INDEX(channel_axes[i] >= 0, op, ": channel axis ", channel_axes[i],
                      " is out of range: -1 stands for none");
    axes[i] = check_axis(op, "channel axis", weights[i], channel_axes[i]);
  }
  return axes;
}

}  // namespace amct_ext
