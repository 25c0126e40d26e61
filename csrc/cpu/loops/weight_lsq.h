// Weights: the gradient of a learned scale, sums of squares.
#pragma once

#include "cpu/loop_params.h"
#include "simd/fixed_order_sum.h"

namespace amct_ext::cpu {
namespace {

// The gradient of a fake-quantised value with respect to the scale. It divides, because the fraction of the quotient
// counts.
template <typename A>
struct ScaleGradient {
  SymmetricParams p;
  A scale = static_cast<A>(p.scale), lowest = static_cast<A>(p.lowest), highest = static_cast<A>(p.highest),
    bottom = lowest * scale, top = highest * scale;

  AMCT_INLINE A operator()(A v) const {
    const A z = v / scale;
    return v < bottom ? lowest : v > top ? highest : math::round_even(z) - z;
  }
  AMCT_INLINE Vec<A> operator()(Vec<A> v) const {
    const Vec<A> z = v / broadcast(scale);
    return v < broadcast(bottom) ? broadcast(lowest) : v > broadcast(top) ? broadcast(highest) : round_even(z) - z;
  }
};

// Rows shorter than kWidth. Not inlined: where compilers know how short a row is, they do not vectorise the lanes.
template <typename T>
__attribute__((noinline)) double short_lsq_backward(const T* grad, const T* w, int64_t n, const SymmetricParams& p) {
  const ScaleGradient<Acc<T>> gradient{p};
  return fixed_order_sum(n, [&](int64_t i) __attribute__((always_inline)) {
    return static_cast<double>(gradient(widen(w[i])) * widen(grad[i]));
  });
}

template <typename T>
double lsq_backward(const void* grad_, const void* w_, int64_t n, const SymmetricParams& p) {
  using A = Acc<T>;
  constexpr int kWidth = CascadeSum<A>::kWidth, kStep = kWidth * CascadeSum<A>::kSteps;
  const T* grad = static_cast<const T*>(grad_);
  const T* w = static_cast<const T*>(w_);
  if (n < kWidth) return short_lsq_backward(grad, w, n, p);
  const ScaleGradient<A> gradient{p};
  CascadeSum<A> sums;
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int64_t end = n - begin < kStep ? n : begin + kStep;
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      prefetch<kWidth * sizeof(T)>(w + i, 2 * kPrefetchDistance);  // nothing is written, so more reads can be in flight
      prefetch<kWidth * sizeof(T)>(grad + i, 2 * kPrefetchDistance);
      for (int k = 0; k < kWidth; k += kLanes2<T>) {
        const Vec2<T> v = load2(w + i + k), g = load2(grad + i + k);
        sums.add(lane_of<T>(k), gradient(v.first) * g.first);
        sums.add(lane_of<T>(k + kSecondStart<T>), gradient(v.second) * g.second);
      }
    }
    for (int k = 0; i < end; ++i, ++k) {
      sums.partial[lane_of<T>(k)] += gradient(widen(w[i])) * widen(grad[i]);
    }
    sums.flush();
  }
  return sums.sums.total();
}

template <typename T>
double sum_squares(const void* w_, int64_t n) {
  const T* __restrict w = static_cast<const T*>(w_);
  return fixed_order_sum(n, [&](int64_t i) __attribute__((always_inline)) {
    const double v = static_cast<double>(widen(w[i]));
    return v * v;
  });
}

template <typename T>
void squares_left(const void* w_, int64_t n, const SymmetricParams& p, double* sums) {
  using A = Acc<T>;
  const T* __restrict w = static_cast<const T*>(w_);
  const A scale = static_cast<A>(p.scale), inverse = A(1) / scale, lowest = static_cast<A>(p.lowest),
          highest = static_cast<A>(p.highest);
  double before[kSumLanes] = {}, after[kSumLanes] = {};
  const auto add = [&](A v, int lane) __attribute__((always_inline)) {
    const A left = math::clamp(math::round_even(v * inverse), lowest, highest) * scale;
    before[lane] += static_cast<double>(v) * static_cast<double>(v);
    after[lane] += static_cast<double>(left) * static_cast<double>(left);
  };
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) add(widen(w[i + l]), l);
  }
  for (int l = 0; i < n; ++i, ++l) add(widen(w[i]), l);
  for (int l = 0; l < kSumLanes; ++l) {
    sums[0] += before[l];
    sums[1] += after[l];
  }
}

}  // namespace
}  // namespace amct_ext::cpu
