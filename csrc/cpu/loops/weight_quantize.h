// Weights: symmetric fake quantisation and integer codes. What the loops wait for is memory: they ask for it ahead.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/loops/weight_range.h"
#include "simd/quotient.h"
#include "simd/vec2.h"

namespace amct_ext::cpu {
namespace {

// Codes times `scale`, or the codes themselves as int8.
template <typename T>
AMCT_INLINE void put(T* y, Acc<T> code, Acc<T> scale) {
  *y = narrow<T>(code * scale);
}
template <typename T>
AMCT_INLINE void put(int8_t* y, Acc<T> code, Acc<T>) {
  *y = static_cast<int8_t>(static_cast<int32_t>(code == code ? code : Acc<T>(0)));
}
template <typename A>
AMCT_INLINE void put_pair(A* y, Pair<A> code, Row<A> scale) {
  store_pair(y, Pair<A>{code.first * scale, code.second * scale});
}
template <typename T>
AMCT_INLINE void put_pair(int8_t* y, Pair<T> code, Row<Acc<T>>) {
  store_codes(y, code);
}

template <bool kMasked, typename T, typename Out>
void symmetric_each(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p) {
  const auto scale = static_cast<Acc<T>>(p.scale), lowest = static_cast<Acc<T>>(p.lowest),
             highest = static_cast<Acc<T>>(p.highest);
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; ++i) {
    put<T>(y + i, math::code(widen(weight<kMasked>(w, mask, i)), scale, lowest, highest), scale);
  }
}

// What a loop does with the values at `next` while it quantises others, from the first on: nothing. `ahead`, in bytes:
// what lies so far ahead of them is brought into the cache.
template <typename T>
struct Alone {
  const T* next;
  int64_t ahead;
  AMCT_INLINE void pair(int64_t) {}
  AMCT_INLINE void values(int64_t, int64_t) {}
};

// It takes their range.
template <typename T>
struct BesideRange {
  const T* next;
  int64_t ahead;
  Extremes<T> extremes = {};

  AMCT_INLINE void pair(int64_t i) {
    extremes.add(load(next + i));
    if constexpr (kPair<T> > kWidth<T>) extremes.add_other(load(next + i + kWidth<T>));
  }
  AMCT_INLINE void values(int64_t i, int64_t n) { extremes.template add_all<false>(next + i, nullptr, n - i); }
};

template <typename T, typename Out, typename Beside>
AMCT_INLINE void pass_pair(Beside& beside, Out* y, int64_t i) {
  bring<kPair<T> * sizeof(T)>(beside.next + i, beside.ahead);
  bring<kPair<T> * sizeof(Out)>(y + i, kLead);
  beside.pair(i);
}

// Rows of a pair or more. The quotient is rounded by way of the reciprocal, and by division where it is not finite or
// too close to the middle between two integers for that: the values of a step are tried together.
template <bool kMasked, typename T, typename Out, typename Beside>
AMCT_INLINE void symmetric_pairs(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p,
                                 Beside& beside) {
  using A = Acc<T>;
  constexpr int kStep = 2 * kPair<T>;
  const auto fast = reciprocal<A>(p.scale, p.lowest, p.highest);
  const A limit = fast.usable ? fast.limit : A(0);  // which every distance reaches
  const Row<A> scale = filled(static_cast<A>(p.scale)), inverse = filled(fast.inverse),
               lowest = filled(static_cast<A>(p.lowest)), highest = filled(static_cast<A>(p.highest));
  const auto pair_at = [&](int64_t i) __attribute__((always_inline)) {
    return kMasked ? load_kept_pair(w + i, mask + i) : load_pair(w + i);
  };
  const auto exact = [&](const Pair<T>& v) __attribute__((always_inline)) {
    return Pair<T>{clamped(rounded(v.first / scale), lowest, highest),
                   clamped(rounded(v.second / scale), lowest, highest)};
  };
  Mask<A> farthest;
  const auto code = [&](Row<A> v) __attribute__((always_inline)) {
    const Row<A> t = v * inverse, whole = rounded(t);
    farthest = larger(farthest, magnitude_bits_of<A>(t - whole));
    return clamped(whole, lowest, highest);
  };
  const bool overlap = n % kPair<T> != 0;
  const Pair<T> last = overlap ? exact(pair_at(n - kPair<T>)) : Pair<T>{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    pass_pair<T>(beside, y, i);
    pass_pair<T>(beside, y, i + kPair<T>);
    farthest = Mask<A>{};
    const Pair<T> v = pair_at(i), u = pair_at(i + kPair<T>);
    Pair<T> first = {code(v.first), code(v.second)}, second = {code(u.first), code(u.second)};
    if (reach<A>(farthest, limit)) [[unlikely]] {
      first = exact(v);
      second = exact(u);
    }
    put_pair(y + i, first, scale);
    put_pair(y + i + kPair<T>, second, scale);
  }
  if (i + kPair<T> <= n) {
    beside.pair(i);
    put_pair(y + i, exact(pair_at(i)), scale);
    i += kPair<T>;
  }
  beside.values(i, n);
  if (overlap) put_pair(y + n - kPair<T>, last, scale);
}

// The same for half formats and results of that format: it is these that are clipped.
template <bool kMasked, typename T, typename Beside>
AMCT_INLINE void symmetric_halves(const T* w, const uint8_t* mask, T* y, int64_t n, const Quotient& quotient,
                                  const Symmetric& p, Beside& beside) {
  const float scale = static_cast<float>(p.scale);
  const Row<float> scales = filled(scale);
  const T bottom = narrow<T>(static_cast<float>(p.lowest) * scale),
          top = narrow<T>(static_cast<float>(p.highest) * scale);
  const auto bits = [&](int64_t i)
                        __attribute__((always_inline)) { return kMasked ? load_kept(w + i, mask + i) : load(w + i); };
  const auto sound = [&](int64_t i) __attribute__((always_inline)) {
    return !reach<T>(magnitudes<T>(bits(i)), as<T>(Traits<T>::kInfinity));
  };
  const auto value = [&](Row<float> v) __attribute__((always_inline)) { return rounded(quotient(v)) * scales; };
  const auto values = [&](int64_t i) __attribute__((always_inline)) {
    const Pair<T> v = kMasked ? widened<T>(bits(i)) : load_pair(w + i);
    return Pair<T>{value(v.first), value(v.second)};
  };
  const auto each = [&](int64_t begin, int64_t end) {
    symmetric_each<kMasked>(w + begin, kMasked ? mask + begin : nullptr, y + begin, end - begin, p);
  };
  const bool whole = n % kPair<T> == 0 || !sound(n - kPair<T>);
  const Pair<T> last = values(n - kPair<T>);
  int64_t i = 0;
  for (; i + kPair<T> <= n; i += kPair<T>) {
    pass_pair<T>(beside, y, i);
    if (sound(i)) [[likely]] {
      store_between(y + i, values(i), bottom, top);
    } else {
      each(i, i + kPair<T>);
    }
  }
  beside.values(i, n);
  if (whole) return each(i, n);
  store_between(y + n - kPair<T>, last, bottom, top);
}

// `y` may be the memory of w: a step is written when it is done, and the last pair, which may overlap the one in front
// of it, is read before anything is written.
template <bool kMasked, typename T, typename Out, typename Beside>
AMCT_INLINE void symmetric(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p, Beside& beside) {
  if constexpr (sizeof(Out) == 2) {
    const Quotient quotient(static_cast<float>(p.scale));
    if (quotient.usable && n >= kPair<T>) return symmetric_halves<kMasked>(w, mask, y, n, quotient, p, beside);
    beside.values(0, n);
    if (!quotient.usable) return symmetric_each<kMasked>(w, mask, y, n, p);
    T row[kPair<T>] = {};
    for (int64_t i = 0; i < n; ++i) row[i] = weight<kMasked>(w, mask, i);
    Alone<T> alone = {row, 0};
    symmetric_halves<false>(row, nullptr, row, kPair<T>, quotient, p, alone);
    for (int64_t i = 0; i < n; ++i) y[i] = row[i];
  } else {
    if (n >= kPair<T>) return symmetric_pairs<kMasked>(w, mask, y, n, p, beside);
    beside.values(0, n);
    symmetric_each<kMasked>(w, mask, y, n, p);
  }
}

template <bool kMasked, typename T, typename Out>
AMCT_INLINE void symmetric(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p) {
  Alone<T> alone = {w, p.ahead};
  symmetric<kMasked>(w, mask, y, n, p, alone);
}

template <typename T>
void quantize(const void* w, void* y, int64_t n, const Symmetric& p) {
  symmetric<false>(static_cast<const T*>(w), nullptr, static_cast<T*>(y), n, p);
}

template <typename T>
Range quantize_and_range(const void* w, void* y, int64_t n, const Symmetric& p, const void* next) {
  BesideRange<T> beside = {static_cast<const T*>(next), p.ahead};
  symmetric<false>(static_cast<const T*>(w), nullptr, static_cast<T*>(y), n, p, beside);
  return beside.extremes.result([&] { return range_by_value<false>(beside.next, nullptr, n); });
}

template <typename T>
void masked_quantize(const void* w, const uint8_t* mask, void* y, int64_t n, const Symmetric& p) {
  symmetric<true>(static_cast<const T*>(w), mask, static_cast<T*>(y), n, p);
}

template <typename T>
void codes(const void* w, int8_t* y, int64_t n, const Symmetric& p) {
  symmetric<false>(static_cast<const T*>(w), nullptr, y, n, p);
}

}  // namespace
}  // namespace amct_ext::cpu
