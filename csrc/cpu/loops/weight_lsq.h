// Weights: the gradient of learned scales, norms.
#pragma once

#include "cpu/dispatch.h"
#include "simd/fixed_order_sum.h"

namespace amct_ext::cpu {
namespace {

// The gradient of a learned scale. It divides: here the fraction counts.
template <typename A>
struct Slope {
  Symmetric p;
  A scale = static_cast<A>(p.scale), lowest = static_cast<A>(p.lowest), highest = static_cast<A>(p.highest),
    bottom = lowest * scale, top = highest * scale;

  AMCT_INLINE A operator()(A v) const {
    const A z = v / scale;
    return v < bottom ? lowest : v > top ? highest : math::round_even(z) - z;
  }
  AMCT_INLINE Row<A> of_row(Row<A> v) const {
    const Row<A> z = v / filled(scale);
    return v < filled(bottom) ? filled(lowest) : v > filled(top) ? filled(highest) : rounded(z) - z;
  }
};

// Rows shorter than a group. On its own, for compilers that know how short they are do not make vectors of the lanes.
template <typename T>
__attribute__((noinline)) double short_lsq_backward(const T* grad, const T* w, int64_t n, const Symmetric& p) {
  const Slope<Acc<T>> slope{p};
  return lane_sum(n, [&](int64_t i) __attribute__((always_inline)) {
    return static_cast<double>(slope(widen(w[i])) * widen(grad[i]));
  });
}

template <typename T>
double lsq_backward(const void* grad_, const void* w_, int64_t n, const Symmetric& p) {
  using A = Acc<T>;
  constexpr int kGroup = GroupSums<A>::kGroup, kStep = kGroup * GroupSums<A>::kSteps;
  const T* grad = static_cast<const T*>(grad_);
  const T* w = static_cast<const T*>(w_);
  if (n < kGroup) return short_lsq_backward(grad, w, n, p);
  const Slope<A> slope{p};
  GroupSums<A> sums;
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int64_t end = n - begin < kStep ? n : begin + kStep;
    int64_t i = begin;
    for (; i + kGroup <= end; i += kGroup) {
      bring<kGroup * sizeof(T)>(w + i, 2 * kLead);  // nothing is written: there is room for more
      bring<kGroup * sizeof(T)>(grad + i, 2 * kLead);
      for (int k = 0; k < kGroup; k += kPair<T>) {
        const Pair<T> v = load_pair(w + i + k), g = load_pair(grad + i + k);
        sums.add(lane_of<T>(k), slope.of_row(v.first) * g.first);
        sums.add(lane_of<T>(k + kSecond<T>), slope.of_row(v.second) * g.second);
      }
    }
    for (int k = 0; i < end; ++i, ++k) {
      sums.partial[lane_of<T>(k)] += slope(widen(w[i])) * widen(grad[i]);
    }
    sums.flush();
  }
  return sums.sums.total();
}

template <typename T>
double sum_squares(const void* w_, int64_t n) {
  const T* __restrict w = static_cast<const T*>(w_);
  return lane_sum(n, [&](int64_t i) __attribute__((always_inline)) {
    const double v = static_cast<double>(widen(w[i]));
    return v * v;
  });
}

}  // namespace
}  // namespace amct_ext::cpu
