// What the kernels on a BatchNorm share: coefficients of its channels, and walks over both layouts.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/layout.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {

using OptionalTensor = std::optional<at::Tensor>;

inline ActivationParams activation_params(c10::string_view activation, std::optional<double> lowest,
                                          std::optional<double> highest) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return {activation == "hardswish" ? ActivationFunction::kHardswish : ActivationFunction::kClamp,
          lowest ? static_cast<float>(*lowest) : -infinity, highest ? static_cast<float>(*highest) : infinity};
}

// The coefficients of all channels. The rounding is that of torch: one multiply-add for the shift.
struct Channels {
  std::vector<float> factor, shift, mean, mean_gradient, variance_gradient, invstd;

  Channels(const at::Tensor& means, const at::Tensor& invstds, const OptionalTensor& weight,
           const OptionalTensor& bias) {
    const int64_t count = means.numel();
    for (std::vector<float>* values : {&factor, &shift, &mean, &mean_gradient, &variance_gradient, &invstd}) {
      values->resize(count + kStripPadding);
    }
    for (int64_t c = 0; c < count; ++c) {
      mean[c] = static_cast<float>(value_at(means, c));
      invstd[c] = static_cast<float>(value_at(invstds, c));
      factor[c] = weight ? invstd[c] * static_cast<float>(value_at(*weight, c)) : invstd[c];
      shift[c] = std::fma(-mean[c], factor[c], bias ? static_cast<float>(value_at(*bias, c)) : 0.0f);
    }
  }

  BatchNormChannel channel(int64_t c) const {
    return {factor[c], shift[c], mean[c], mean_gradient[c], variance_gradient[c]};
  }
  BatchNormRows rows() const {
    return {factor.data(), shift.data(), mean.data(), mean_gradient.data(), variance_gradient.data()};
  }
};

inline int64_t rows_per_block(const AxisView& view) {
  return std::max<int64_t>(1, kBlock / std::max<int64_t>(1, view.size));
}
inline int64_t row_blocks(const AxisView& view) {
  return (view.outer + rows_per_block(view) - 1) / rows_per_block(view);
}

// f(block, first row, number of rows), where channels are neighbours in memory.
template <typename F>
void for_row_blocks(const AxisView& view, const F& f) {
  const int64_t together = rows_per_block(view);
  at::parallel_for(0, row_blocks(view), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      f(block, block * together, std::min(together, view.outer - block * together));
    }
  });
}

// f(channel, first element, number of elements) for pieces of planes, where a plane is what one channel has together.
template <typename F>
void for_plane_pieces(const AxisView& view, const F& f) {
  const int64_t pieces = std::max<int64_t>(1, block_count(view.inner));
  const int64_t planes = view.inner == 0 ? 0 : view.outer * view.size;
  at::parallel_for(0, planes * pieces, row_grain(std::min(view.inner, kBlock)), [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t plane = piece / pieces, skip = piece % pieces * kBlock;
      f(plane % view.size, plane * view.inner + skip, std::min(kBlock, view.inner - skip));
    }
  });
}

}  // namespace amct_ext::cpu
