// Weights: range, the gradient of learned scales, norms.
#pragma once

#include <type_traits>

#include "cpu/isa/sums.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

template <bool kMasked, typename T>
AMCT_INLINE V<T> weights(const T* w, const uint8_t* mask, int64_t i) {
  if constexpr (kMasked) return load_kept(w + i, mask + i);
  return load(w + i);
}

template <bool kMasked, typename T>
Range range_by_value(const T* w, const uint8_t* mask, int64_t n) {
  Acc<T> largest = widen(weight<kMasked>(w, mask, 0)), smallest = largest;
  for (int64_t i = 1; i < n; ++i) {
    const Acc<T> v = widen(weight<kMasked>(w, mask, i));
    largest = v > largest ? v : largest;
    smallest = v < smallest ? v : smallest;
  }
  return {static_cast<double>(largest), static_cast<double>(smallest)};
}

// Bit patterns are ordered as the magnitudes: the largest pattern read as a signed number is the largest value, the
// largest read as an unsigned one the smallest, provided that there are values of both signs. Two integer maxima, NaN
// included.
template <bool kMasked, typename T>
AMCT_INLINE Range range_of(const T* w, const uint8_t* mask, int64_t n) {
  using Unsigned = Bits<T>;
  using Signed = std::make_signed_t<Unsigned>;
  constexpr Unsigned infinity = Traits<T>::kInfinity, sign = Traits<T>::kSign;
  Signed high = static_cast<Signed>(sign);
  Unsigned low = 0;
  const auto join = [&](Unsigned bits) __attribute__((always_inline)) {
    high = static_cast<Signed>(bits) > high ? static_cast<Signed>(bits) : high;
    low = bits > low ? bits : low;
  };
  constexpr int width = kWidth<T>;
  int64_t i = 0;
  if (kMaxima && n >= width) {
    V<T> highs = V<T>{} + high;
    U<T> lows = {};
    for (; i + width <= n; i += width) {
      const V<T> bits = weights<kMasked>(w, mask, i);
      highs = larger(highs, bits);
      lows = larger(lows, as<U<T>>(bits));
    }
    for (int l = 0; l < width; ++l) {
      high = highs[l] > high ? highs[l] : high;
      low = lows[l] > low ? lows[l] : low;
    }
  }
  for (; i < n; ++i) join(as<Unsigned>(weight<kMasked>(w, mask, i)));
  const bool negative = low >= sign, positive = high >= 0;
  if ((positive && static_cast<Unsigned>(high) > infinity) || (negative && (low ^ sign) > infinity)) {
    return {__builtin_nan(""), __builtin_nan("")};
  }
  if (!negative || !positive) return range_by_value<kMasked>(w, mask, n);
  return {static_cast<double>(widen(as<T>(static_cast<Unsigned>(high)))), static_cast<double>(widen(as<T>(low)))};
}

template <typename T>
Range range(const void* w, int64_t n) {
  return range_of<false>(static_cast<const T*>(w), nullptr, n);
}

template <typename T>
Range masked_range(const void* w, const uint8_t* mask, int64_t n) {
  return range_of<true>(static_cast<const T*>(w), mask, n);
}

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
