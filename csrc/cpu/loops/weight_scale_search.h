// Weights: how well the codes of each scale that is tried fit.
#pragma once

#include "cpu/loop_params.h"
#include "simd/fixed_order_sum.h"

namespace amct_ext::cpu {
namespace {

constexpr int64_t kFitChunk = 1024;  // weights that stay in the L1 cache while all scales are tried

// Squares of codes of at most 8 bits, a chunk's worth in each lane: float32 holds their sum exactly.
template <typename A>
AMCT_INLINE void add_fit(const A* values, int64_t n, A inverse, A lowest, A highest, double* sums) {
  double products[kSumLanes] = {};
  A squares[kSumLanes] = {};
  const auto add = [&](A v, int lane) __attribute__((always_inline)) {
    const A code = math::clamp(math::round_even(v * inverse), lowest, highest);
    products[lane] += static_cast<double>(v * code);
    squares[lane] += code * code;
  };
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) add(values[i + l], l);
  }
  for (int l = 0; i < n; ++i, ++l) add(values[i], l);
  for (int l = 0; l < kSumLanes; ++l) {
    sums[0] += products[l];
    sums[1] += static_cast<double>(squares[l]);
  }
}

template <typename T>
void scale_fits(const void* w_, const uint8_t* mask, int64_t n, const ScaleSearchParams& p, double* sums) {
  using A = Acc<T>;
  const T* w = static_cast<const T*>(w_);
  const A range_scale = static_cast<A>(p.range_scale), lowest = static_cast<A>(p.lowest),
          highest = static_cast<A>(p.highest);
  alignas(64) A values[kFitChunk];
  for (int64_t begin = 0; begin < n; begin += kFitChunk) {
    const int64_t count = n - begin < kFitChunk ? n - begin : kFitChunk;
    if (mask) {
      for (int64_t i = 0; i < count; ++i) values[i] = widen(load_element<true>(w, mask, begin + i));
    } else {
      for (int64_t i = 0; i < count; ++i) values[i] = widen(w[begin + i]);
    }
    for (int c = 0; c < math::kScaleFactors; ++c) {
      const A scale = range_scale * static_cast<A>(math::scale_factor(c));
      add_fit(values, count, A(1) / scale, lowest, highest, sums + 2 * c);
    }
  }
}

}  // namespace
}  // namespace amct_ext::cpu
