// Weights: symmetric fake quantisation and integer codes.
#pragma once

#include <type_traits>

#include "cpu/isa/pairs.h"
#include "cpu/isa/quotient.h"
#include "cpu/kernels.h"

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

// A mask that is null keeps all. `y` may be the memory of w.
template <typename T, typename Out>
void symmetric_each(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p) {
  const auto scale = static_cast<Acc<T>>(p.scale), lowest = static_cast<Acc<T>>(p.lowest),
             highest = static_cast<Acc<T>>(p.highest);
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; ++i) {
    put<T>(y + i, math::code(widen(masked(w[i], !mask || mask[i])), scale, lowest, highest), scale);
  }
}

// Values are clipped before the division, which gives the same codes and leaves no quotient that is not finite. Returns
// how many values are done.
template <bool kMasked, typename T, typename Out>
AMCT_INLINE int64_t symmetric_pairs(const T* w, const uint8_t* mask, Out* y, int64_t n, const Quotient<T>& quotient,
                                    Row<Acc<T>> scale, Row<Acc<T>> bottom, Row<Acc<T>> top) {
  using A = Acc<T>;
  const auto code = [&](Row<A> v) __attribute__((always_inline)) { return rounded(quotient(clamped(v, bottom, top))); };
  int64_t i = 0;
  for (; i + kPair<T> <= n; i += kPair<T>) {
    const Pair<T> v = kMasked ? load_kept_pair(w + i, mask + i) : load_pair(w + i);
    put_pair(y + i, Pair<T>{code(v.first), code(v.second)}, scale);
  }
  return i;
}

// The same for half formats and results of that format: it is these that are clipped.
template <bool kMasked, typename T>
AMCT_INLINE int64_t symmetric_halves(const T* w, const uint8_t* mask, T* y, int64_t n, const Quotient<T>& quotient,
                                     float scale, const Symmetric& p) {
  const Row<float> scales = filled(scale);
  const auto value = [&](Row<float> v) __attribute__((always_inline)) { return rounded(quotient(v)) * scales; };
  const T bottom = narrow<T>(static_cast<float>(p.lowest) * scale),
          top = narrow<T>(static_cast<float>(p.highest) * scale);
  int64_t i = 0;
  for (; i + kPair<T> <= n; i += kPair<T>) {
    const V<T> bits = kMasked ? load_kept(w + i, mask + i) : load(w + i);
    if (reach<T>(magnitudes<T>(bits), as<T>(Traits<T>::kInfinity))) [[unlikely]] {
      symmetric_each(w + i, kMasked ? mask + i : nullptr, y + i, kPair<T>, p);
      continue;
    }
    const Pair<T> v = kMasked ? widened<T>(bits) : load_pair(w + i);
    store_between(y + i, Pair<T>{value(v.first), value(v.second)}, bottom, top);
  }
  return i;
}

// A pair at a time, each written when it is done: `y` may be the memory of w.
template <bool kMasked, typename T, typename Out>
AMCT_INLINE void symmetric(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p) {
  using A = Acc<T>;
  const A scale = static_cast<A>(p.scale);
  const Quotient<T> quotient(scale);
  int64_t done = 0;
  if (quotient.usable) {
    if constexpr (sizeof(Out) == 2) {
      done = symmetric_halves<kMasked>(w, mask, y, n, quotient, scale, p);
    } else {
      done = symmetric_pairs<kMasked>(w, mask, y, n, quotient, filled(scale), filled(static_cast<A>(p.lowest) * scale),
                                      filled(static_cast<A>(p.highest) * scale));
    }
  }
  symmetric_each(w + done, kMasked ? mask + done : nullptr, y + done, n - done, p);
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

}  // namespace
}  // namespace amct_ext::cpu
