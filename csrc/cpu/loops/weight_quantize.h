// Weights: symmetric fake quantisation and integer codes. The loops are bound by memory, so they prefetch.
#pragma once

#include "cpu/loop_params.h"
#include "cpu/loops/weight_range.h"
#include "simd/half_divider.h"
#include "simd/reciprocal.h"
#include "simd/vec2.h"

namespace amct_ext::cpu {
namespace {

// Stores codes times `scale`, or the codes themselves as int8: of one element, and of a Vec2.
template <typename T>
AMCT_INLINE void store_code(T* y, Acc<T> code, Acc<T> scale) {
  *y = narrow<T>(code * scale);
}
template <typename T>
AMCT_INLINE void store_code(int8_t* y, Acc<T> code, Acc<T>) {
  *y = static_cast<int8_t>(static_cast<int32_t>(code == code ? code : Acc<T>(0)));
}
template <typename A>
AMCT_INLINE void store2_code(A* y, Vec2<A> code, Vec<A> scale) {
  store2(y, Vec2<A>{code.first * scale, code.second * scale});
}
template <typename T>
AMCT_INLINE void store2_code(int8_t* y, Vec2<T> code, Vec<Acc<T>>) {
  store2_int8(y, code);
}

template <bool kMasked, typename T, typename Out>
void quantize_elements(const T* w, const uint8_t* mask, Out* y, int64_t n, const SymmetricParams& p) {
  const auto scale = static_cast<Acc<T>>(p.scale), lowest = static_cast<Acc<T>>(p.lowest),
             highest = static_cast<Acc<T>>(p.highest);
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; ++i) {
    store_code<T>(y + i, math::code(widen(load_element<kMasked>(w, mask, i)), scale, lowest, highest), scale);
  }
}

// Lookahead: what the quantising loop does at the same time with the values at `next`. It prefetches what lies
// `prefetch_distance` bytes beyond them and calls vec2(i) for values [i, i + kLanes2), elements(i, n) for [i, n).
template <typename T>
struct PrefetchOnly {
  const T* next;
  int64_t prefetch_distance;
  AMCT_INLINE void vec2(int64_t) {}
  AMCT_INLINE void elements(int64_t, int64_t) {}
};

// Takes the range of the values at `next`: quantising row i also computes the range of row i + 1, so each weight is
// loaded from memory once.
template <typename T>
struct RangeOfNext {
  const T* next;
  int64_t prefetch_distance;
  RangeTracker<T> range = {};

  AMCT_INLINE void vec2(int64_t i) {
    range.add(load_bits(next + i));
    if constexpr (kLanes2<T> > kLanes<T>) range.add_second(load_bits(next + i + kLanes<T>));
  }
  AMCT_INLINE void elements(int64_t i, int64_t n) { range.template add_all<false>(next + i, nullptr, n - i); }
};

template <typename T, typename Out, typename Lookahead>
AMCT_INLINE void look_ahead(Lookahead& lookahead, Out* y, int64_t i) {
  prefetch<kLanes2<T> * sizeof(T)>(lookahead.next + i, lookahead.prefetch_distance);
  prefetch<kLanes2<T> * sizeof(Out)>(y + i, kPrefetchDistance);
  lookahead.vec2(i);
}

// Rows of at least one Vec2. The quotient is rounded by the reciprocal; a step of two Vec2 in which a value is not
// finite or too close to a tie is redone by division. A last Vec2 that overlaps the one before is computed first and
// stored last, because y may be w.
template <bool kMasked, typename T, typename Out, typename Lookahead>
AMCT_INLINE void quantize_vec2(const T* w, const uint8_t* mask, Out* y, int64_t n, const SymmetricParams& p,
                               Lookahead& lookahead) {
  using A = Acc<T>;
  constexpr int kStep = 2 * kLanes2<T>;
  const auto recip = reciprocal<A>(p.scale, p.lowest, p.highest);
  const A max_safe_distance = recip.usable ? recip.max_safe_distance : A(0);  // 0: every step takes the division
  const Vec<A> scale = broadcast(static_cast<A>(p.scale)), inverse = broadcast(recip.inverse),
               lowest = broadcast(static_cast<A>(p.lowest)), highest = broadcast(static_cast<A>(p.highest));
  const auto load2_at = [&](int64_t i) __attribute__((always_inline)) {
    return kMasked ? load2_masked(w + i, mask + i) : load2(w + i);
  };
  const auto exact = [&](const Vec2<T>& v) __attribute__((always_inline)) {
    return Vec2<T>{clamp(round_even(v.first / scale), lowest, highest),
                   clamp(round_even(v.second / scale), lowest, highest)};
  };
  Mask<A> max_distance;
  const auto code = [&](Vec<A> v) __attribute__((always_inline)) {
    const Vec<A> t = v * inverse, rounded = round_even(t);
    max_distance = max(max_distance, abs_bits<A>(t - rounded));
    return clamp(rounded, lowest, highest);
  };
  const bool overlap = n % kLanes2<T> != 0;
  const Vec2<T> last = overlap ? exact(load2_at(n - kLanes2<T>)) : Vec2<T>{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    look_ahead<T>(lookahead, y, i);
    look_ahead<T>(lookahead, y, i + kLanes2<T>);
    max_distance = Mask<A>{};
    const Vec2<T> v0 = load2_at(i), v1 = load2_at(i + kLanes2<T>);
    Vec2<T> code0 = {code(v0.first), code(v0.second)}, code1 = {code(v1.first), code(v1.second)};
    if (any_ge<A>(max_distance, max_safe_distance)) [[unlikely]] {
      code0 = exact(v0);
      code1 = exact(v1);
    }
    store2_code(y + i, code0, scale);
    store2_code(y + i + kLanes2<T>, code1, scale);
  }
  if (i + kLanes2<T> <= n) {
    lookahead.vec2(i);
    store2_code(y + i, exact(load2_at(i)), scale);
    i += kLanes2<T>;
  }
  lookahead.elements(i, n);
  if (overlap) store2_code(y + n - kLanes2<T>, last, scale);
}

// The same for half formats with results of that format: there the results are clamped instead of the codes.
template <bool kMasked, typename T, typename Lookahead>
AMCT_INLINE void quantize_half(const T* w, const uint8_t* mask, T* y, int64_t n, const HalfDivider& divide,
                               const SymmetricParams& p, Lookahead& lookahead) {
  const float scale = static_cast<float>(p.scale);
  const Vec<float> scales = broadcast(scale);
  const T bottom = narrow<T>(static_cast<float>(p.lowest) * scale),
          top = narrow<T>(static_cast<float>(p.highest) * scale);
  const auto bits = [&](int64_t i) __attribute__((always_inline)) {
    return kMasked ? load_masked(w + i, mask + i) : load_bits(w + i);
  };
  const auto all_finite_at = [&](int64_t i) __attribute__((always_inline)) {
    return !any_ge<T>(abs_bits<T>(bits(i)), bit_cast<T>(Traits<T>::kInfBits));
  };
  const auto value = [&](Vec<float> v) __attribute__((always_inline)) { return round_even(divide(v)) * scales; };
  const auto values = [&](int64_t i) __attribute__((always_inline)) {
    const Vec2<T> v = kMasked ? widen2<T>(bits(i)) : load2(w + i);
    return Vec2<T>{value(v.first), value(v.second)};
  };
  const auto by_element = [&](int64_t begin, int64_t end) {
    quantize_elements<kMasked>(w + begin, kMasked ? mask + begin : nullptr, y + begin, end - begin, p);
  };
  const bool tail_by_element = n % kLanes2<T> == 0 || !all_finite_at(n - kLanes2<T>);
  const Vec2<T> last = values(n - kLanes2<T>);
  int64_t i = 0;
  for (; i + kLanes2<T> <= n; i += kLanes2<T>) {
    look_ahead<T>(lookahead, y, i);
    if (all_finite_at(i)) [[likely]] {
      store2_clamped(y + i, values(i), bottom, top);
    } else {
      by_element(i, i + kLanes2<T>);
    }
  }
  lookahead.elements(i, n);
  if (tail_by_element) return by_element(i, n);
  store2_clamped(y + n - kLanes2<T>, last, bottom, top);
}

// Quantises n values; y may be the memory of w.
template <bool kMasked, typename T, typename Out, typename Lookahead>
AMCT_INLINE void quantize_row(const T* w, const uint8_t* mask, Out* y, int64_t n, const SymmetricParams& p,
                              Lookahead& lookahead) {
  if constexpr (sizeof(Out) == 2) {
    const HalfDivider divide(static_cast<float>(p.scale));
    if (divide.usable && n >= kLanes2<T>) return quantize_half<kMasked>(w, mask, y, n, divide, p, lookahead);
    lookahead.elements(0, n);
    if (!divide.usable) return quantize_elements<kMasked>(w, mask, y, n, p);
    T padded[kLanes2<T>] = {};
    for (int64_t i = 0; i < n; ++i) padded[i] = load_element<kMasked>(w, mask, i);
    PrefetchOnly<T> no_lookahead = {padded, 0};
    quantize_half<false>(padded, nullptr, padded, kLanes2<T>, divide, p, no_lookahead);
    for (int64_t i = 0; i < n; ++i) y[i] = padded[i];
  } else {
    if (n >= kLanes2<T>) return quantize_vec2<kMasked>(w, mask, y, n, p, lookahead);
    lookahead.elements(0, n);
    quantize_elements<kMasked>(w, mask, y, n, p);
  }
}

template <bool kMasked, typename T, typename Out>
AMCT_INLINE void quantize_row(const T* w, const uint8_t* mask, Out* y, int64_t n, const SymmetricParams& p) {
  PrefetchOnly<T> no_lookahead = {w, p.prefetch_distance};
  quantize_row<kMasked>(w, mask, y, n, p, no_lookahead);
}

template <typename T>
void quantize(const void* w, void* y, int64_t n, const SymmetricParams& p) {
  quantize_row<false>(static_cast<const T*>(w), nullptr, static_cast<T*>(y), n, p);
}

template <typename T>
Range quantize_and_range(const void* w, void* y, int64_t n, const SymmetricParams& p, const void* next) {
  RangeOfNext<T> lookahead = {static_cast<const T*>(next), p.prefetch_distance};
  quantize_row<false>(static_cast<const T*>(w), nullptr, static_cast<T*>(y), n, p, lookahead);
  return lookahead.range.result([&] { return range_by_value<false>(lookahead.next, nullptr, n); });
}

template <typename T>
void masked_quantize(const void* w, const uint8_t* mask, void* y, int64_t n, const SymmetricParams& p) {
  quantize_row<true>(static_cast<const T*>(w), mask, static_cast<T*>(y), n, p);
}

template <typename T>
void quantize_codes(const void* w, int8_t* y, int64_t n, const SymmetricParams& p) {
  quantize_row<false>(static_cast<const T*>(w), nullptr, y, n, p);
}

}  // namespace
}  // namespace amct_ext::cpu
