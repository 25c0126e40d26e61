// Weights: range, symmetric fake quantisation, integer codes, the gradient of learned scales, norms.
#pragma once

#include <type_traits>

#include "cpu/isa/register.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

// Weights that are masked read as +0 where they are not kept.
template <bool kMasked, typename T>
AMCT_INLINE T weight(const T* w, const uint8_t* mask, int64_t i) {
  if constexpr (!kMasked) return w[i];
  const Bits<T> keep = static_cast<Bits<T>>(0 - static_cast<Bits<T>>(mask[i]));  // a bool is 0 or 1
  return as<T>(static_cast<Bits<T>>(as<Bits<T>>(w[i]) & keep));
}
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
  if (kByRegister && n >= width) {
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

// Codes times `scale`, or the codes themselves as int8.
template <typename T>
AMCT_INLINE void put(T* y, Acc<T> code, Acc<T> scale) {
  *y = narrow<T>(code * scale);
}
template <typename T>
AMCT_INLINE void put(int8_t* y, Acc<T> code, Acc<T>) {
  *y = static_cast<int8_t>(static_cast<int32_t>(code == code ? code : Acc<T>(0)));
}

template <bool kMasked, typename T, typename Out>
AMCT_INLINE void symmetric_exact(const T* __restrict w, const uint8_t* __restrict mask, Out* __restrict y, int64_t n,
                                 Acc<T> scale, Acc<T> lowest, Acc<T> highest) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; ++i) {
    put<T>(y + i, math::code(widen(weight<kMasked>(w, mask, i)), scale, lowest, highest), scale);
  }
}

// A number that is not NaN between a negative bound and a positive one. Where there are integer minima those of the
// patterns, for compilers make seven instructions of the comparisons of floating-point numbers.
template <typename A>
AMCT_INLINE A between(A v, A lowest, A highest) {
  if (!kByRegister) return math::clamp(v, lowest, highest);
  using Unsigned = BitsOf<A>;
  using Signed = std::make_signed_t<Unsigned>;
  const Unsigned bits = as<Unsigned>(v), low = as<Unsigned>(lowest);
  const Unsigned above = bits < low ? bits : low;  // a conversion in the same expression would hide the minimum
  const Signed within = static_cast<Signed>(above), high = as<Signed>(highest);
  return as<A>(within < high ? within : high);
}

// Whether all values are so near to integers that the codes are those of the division; one that is not finite is not.
template <bool kMasked, typename T, typename Out>
AMCT_INLINE bool symmetric_fast(const T* __restrict w, const uint8_t* __restrict mask, Out* __restrict y, int64_t n,
                                Acc<T> scale, Reciprocal<Acc<T>> fast, Acc<T> lowest, Acc<T> highest) {
  using A = Acc<T>;
  const auto limit = as<BitsOf<A>>(fast.limit);
  int64_t i = 0;
  V<A> farthest = {};
  if constexpr (kByRegister && std::is_same_v<A, T> && std::is_same_v<A, Out>) {
    const U<A> low = U<A>{} + as<BitsOf<A>>(lowest);
    const V<A> high = V<A>{} + as<Lane<A>>(highest);
    for (; i + kWidth<A> <= n; i += kWidth<A>) {
      const F<A> t = as<F<A>>(weights<kMasked>(w, mask, i)) * fast.inverse, code = round_even<A>(t);
      farthest = larger(farthest, magnitudes<A>(as<V<A>>(t - code)));
      const F<A> v = as<F<A>>(smaller(as<V<A>>(smaller(as<U<A>>(code), low)), high)) * scale;
      __builtin_memcpy(y + i, &v, sizeof(v));
    }
  }
  BitsOf<A> most = 0;
#pragma GCC unroll 1
  for (; i < n; ++i) {
    const A t = widen(weight<kMasked>(w, mask, i)) * fast.inverse, code = math::round_even(t);
    const BitsOf<A> distance = magnitude_bits(t - code);
    most = distance > most ? distance : most;
    put<T>(y + i, between(code, lowest, highest), scale);
  }
  return most < limit && !(kByRegister && any(farthest >= static_cast<Lane<A>>(limit)));
}

// As `reciprocal`, with a closer bound, there being no offset: product and reciprocal are off by three halves of a unit
// in the last place of the largest code, and codes beyond the range are the same after clamping. Where more than a
// quarter of the steps would be done again the division is the faster way.
template <typename A>
AMCT_INLINE Reciprocal<A> symmetric_reciprocal(const Symmetric& p) {
  constexpr double ulp = sizeof(A) == 8 ? 2.220446049250313e-16 : 1.1920928955078125e-07;
  const double near = 2 * ulp * -p.lowest;
  const bool ordinary = p.scale > 1e-30 && p.scale < 1e30;
  return {A(1) / static_cast<A>(p.scale), static_cast<A>(0.5 - near), ordinary && near < 5e-4};
}

template <bool kMasked, typename T, typename Out>
AMCT_INLINE void symmetric(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p) {
  const Acc<T> scale = static_cast<Acc<T>>(p.scale), lowest = static_cast<Acc<T>>(p.lowest),
               highest = static_cast<Acc<T>>(p.highest);
  const auto fast = symmetric_reciprocal<Acc<T>>(p);
  for (int64_t begin = 0; begin < n; begin += kRetryOf<T>) {
    const int64_t count = n - begin < kRetryOf<T> ? n - begin : kRetryOf<T>;
    const auto step = [&]<bool kKeeps>(const auto* in, const uint8_t* keep, auto* out) __attribute__((always_inline)) {
      if (!fast.usable || !symmetric_fast<kKeeps>(in, keep, out, count, scale, fast, lowest, highest)) {
        symmetric_exact<kKeeps>(in, keep, out, count, scale, lowest, highest);
      }
    };
    const uint8_t* keep = kMasked ? mask + begin : nullptr;
    if constexpr (std::is_same_v<T, Out> && kConverts<T>) {
      T kept[kHalfRetry];
      if (kMasked) {
        for (int64_t i = 0; i < count; ++i) kept[i] = weight<true>(w + begin, keep, i);
      }
      converted(kMasked ? kept : w + begin, y + begin, count,
                [&](const float* in, float* out)
                    __attribute__((always_inline)) { step.template operator()<false>(in, nullptr, out); });
    } else {
      step.template operator()<kMasked>(w + begin, keep, y + begin);
    }
  }
}

template <typename T>
void quantize(const void* w, void* y, int64_t n, const Symmetric& p) {
  symmetric<false>(static_cast<const T*>(w), nullptr, static_cast<T*>(y), n, p);
}

template <typename T>
void masked_quantize(const void* w, const uint8_t* mask, void* y, int64_t n, const Symmetric& p) {
  symmetric<true>(static_cast<const T*>(w), mask, static_cast<T*>(y), n, p);
}

template <typename T>
void codes(const void* w, int8_t* y, int64_t n, const Symmetric& p) {
  symmetric<false>(static_cast<const T*>(w), nullptr, y, n, p);
}

// Sums run in fixed lanes of float64, see activation.h. A row in several pieces must be cut at multiples of the lanes.
template <typename Term>
AMCT_INLINE void add_to_lanes(double* sums, int64_t n, Term term) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += term(i + l);
  }
  for (int l = 0; i < n; ++i, ++l) sums[l] += term(i);
}

AMCT_INLINE double total_of_lanes(const double* sums) {
  double total = 0;
  for (int l = 0; l < kLanes; ++l) total += sums[l];
  return total;
}

template <typename T, typename Term>
AMCT_INLINE double lane_sum(int64_t n, Term term) {
  double sums[kLanes] = {};
  add_to_lanes(sums, n, term);
  return total_of_lanes(sums);
}

template <typename T>
AMCT_INLINE void add_lsq_terms(double* sums, const T* __restrict grad, const T* __restrict w, int64_t n,
                               const Symmetric& p) {
  const Acc<T> scale = static_cast<Acc<T>>(p.scale), lowest = static_cast<Acc<T>>(p.lowest),
               highest = static_cast<Acc<T>>(p.highest);
  const Acc<T> bottom = lowest * scale, top = highest * scale;
  add_to_lanes(sums, n, [&](int64_t i) __attribute__((always_inline)) {
    const Acc<T> v = widen(w[i]), z = v / scale;
    const Acc<T> slope = v < bottom ? lowest : v > top ? highest : math::round_even(z) - z;
    return static_cast<double>(slope * widen(grad[i]));
  });
}

template <typename T>
double lsq_backward(const void* grad_, const void* w_, int64_t n, const Symmetric& p) {
  const T* grad = static_cast<const T*>(grad_);
  const T* w = static_cast<const T*>(w_);
  double sums[kLanes] = {};
  if constexpr (kConverts<T>) {
    constexpr int64_t kStep = 512;
    alignas(64) float g[kStep], x[kStep];
    for (int64_t begin = 0; begin < n; begin += kStep) {
      const int64_t count = n - begin < kStep ? n - begin : kStep;
      widen_step(grad + begin, g, count);
      widen_step(w + begin, x, count);
      add_lsq_terms(sums, g, x, count, p);
    }
  } else {
    add_lsq_terms(sums, grad, w, n, p);
  }
  return total_of_lanes(sums);
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
