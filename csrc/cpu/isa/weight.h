// Weights: range, symmetric fake quantisation, integer codes, the gradient of learned scales, norms.
#pragma once

#include <type_traits>

#include "cpu/isa/scalar.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

template <typename T>
Range range_by_value(const T* __restrict w, int64_t n) {
  Acc<T> largest = widen(w[0]), smallest = largest;
  for (int64_t i = 1; i < n; ++i) {
    const Acc<T> v = widen(w[i]);
    largest = v > largest ? v : largest;
    smallest = v < smallest ? v : smallest;
  }
  return {static_cast<double>(largest), static_cast<double>(smallest)};
}

// Bit patterns are ordered as the magnitudes: the largest pattern read as a signed number is the largest value, the
// largest read as an unsigned one the smallest, provided that there are values of both signs. Two integer maxima, NaN
// included.
template <typename T>
Range range(const void* w_, int64_t n) {
  using Unsigned = Bits<T>;
  using Signed = std::make_signed_t<Unsigned>;
  const T* __restrict w = static_cast<const T*>(w_);
  Signed high = static_cast<Signed>(as<Unsigned>(w[0]));
  Unsigned low = as<Unsigned>(w[0]);
  for (int64_t i = 1; i < n; ++i) {
    const Unsigned bits = as<Unsigned>(w[i]);
    high = static_cast<Signed>(bits) > high ? static_cast<Signed>(bits) : high;
    low = bits > low ? bits : low;
  }
  constexpr Unsigned infinity = Traits<T>::kInfinity, sign = Traits<T>::kSign;
  const bool negative = low >= sign, positive = high >= 0;
  if ((positive && static_cast<Unsigned>(high) > infinity) || (negative && (low ^ sign) > infinity)) {
    return {__builtin_nan(""), __builtin_nan("")};
  }
  if (!negative || !positive) return range_by_value(w, n);
  return {static_cast<double>(widen(as<T>(static_cast<Unsigned>(high)))), static_cast<double>(widen(as<T>(low)))};
}

// Codes times `scale`, or the codes themselves as int8.
template <typename T>
AMCT_INLINE void put(T* y, Acc<T> code, Acc<T> scale) {
  *y = narrow<T>(code * scale);
}
template <typename T>
AMCT_INLINE void put(int8_t* y, Acc<T> code, Acc<T>) {
  *y = static_cast<int8_t>(static_cast<int32_t>(code == code ? code : Acc<T>(0)));
}

template <typename T, typename Out>
AMCT_INLINE void symmetric_exact(const T* __restrict w, Out* __restrict y, int64_t n, Acc<T> scale, Acc<T> lowest,
                                 Acc<T> highest) {
  for (int64_t i = 0; i < n; ++i) put<T>(y + i, math::code(widen(w[i]), scale, lowest, highest), scale);
}

// Returns the largest distance from an integer, as bits.
template <typename T, typename Out>
AMCT_INLINE BitsOf<Acc<T>> symmetric_fast(const T* __restrict w, Out* __restrict y, int64_t n, Acc<T> scale,
                                          Acc<T> inverse, Acc<T> lowest, Acc<T> highest) {
  BitsOf<Acc<T>> farthest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc<T> t = widen(w[i]) * inverse, code = math::round_even(t);
    const BitsOf<Acc<T>> distance = magnitude_bits(t - code);
    farthest = distance > farthest ? distance : farthest;
    put<T>(y + i, math::clamp(code, lowest, highest), scale);
  }
  return farthest;
}

template <typename T, typename Out>
AMCT_INLINE void symmetric(const void* w_, Out* y, int64_t n, const Symmetric& p) {
  const T* w = static_cast<const T*>(w_);
  const Acc<T> scale = static_cast<Acc<T>>(p.scale), lowest = static_cast<Acc<T>>(p.lowest),
               highest = static_cast<Acc<T>>(p.highest);
  const auto fast = reciprocal<Acc<T>>(p.scale, p.lowest, p.highest);
  const auto limit = as<BitsOf<Acc<T>>>(fast.limit);
  for (int64_t begin = 0; begin < n; begin += kRetryOf<T>) {
    const int64_t count = n - begin < kRetryOf<T> ? n - begin : kRetryOf<T>;
    const auto loop = [&](const auto* in, auto* out) __attribute__((always_inline)) {
      using From = std::remove_cvref_t<decltype(*in)>;
      if (!fast.usable || symmetric_fast<From>(in, out, count, scale, fast.inverse, lowest, highest) >= limit) {
        symmetric_exact<From>(in, out, count, scale, lowest, highest);
      }
    };
    if constexpr (std::is_same_v<T, Out>) {
      converted(w + begin, y + begin, count, loop);
    } else {
      loop(w + begin, y + begin);
    }
  }
}

template <typename T>
void quantize(const void* w, void* y, int64_t n, const Symmetric& p) {
  symmetric<T>(w, static_cast<T*>(y), n, p);
}

template <typename T>
void codes(const void* w, int8_t* y, int64_t n, const Symmetric& p) {
  symmetric<T>(w, y, n, p);
}

// Sums run in fixed lanes of float64, see activation.h.
template <typename T, typename Term>
AMCT_INLINE double lane_sum(int64_t n, Term term) {
  constexpr int kLanes = 16;
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += term(i + l);
  }
  for (int l = 0; i < n; ++i, ++l) sums[l] += term(i);
  double total = 0;
  for (int l = 0; l < kLanes; ++l) total += sums[l];
  return total;
}

template <typename T>
double lsq_backward(const void* grad_, const void* w_, int64_t n, const Symmetric& p) {
  const T* __restrict grad = static_cast<const T*>(grad_);
  const T* __restrict w = static_cast<const T*>(w_);
  const Acc<T> scale = static_cast<Acc<T>>(p.scale), lowest = static_cast<Acc<T>>(p.lowest),
               highest = static_cast<Acc<T>>(p.highest);
  const Acc<T> bottom = lowest * scale, top = highest * scale;
  return lane_sum<T>(n, [&](int64_t i) __attribute__((always_inline)) {
    const Acc<T> v = widen(w[i]), z = v / scale;
    const Acc<T> slope = v < bottom ? lowest : v > top ? highest : math::round_even(z) - z;
    return static_cast<double>(slope * widen(grad[i]));
  });
}

template <typename T>
double sum_squares(const void* w_, int64_t n) {
  const T* __restrict w = static_cast<const T*>(w_);
  return lane_sum<T>(n, [&](int64_t i) __attribute__((always_inline)) {
    const double v = static_cast<double>(widen(w[i]));
    return v * v;
  });
}

}  // namespace
}  // namespace amct_ext::cpu
