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

template <bool kMasked, typename T, typename Out>
void symmetric_each(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p) {
  const auto scale = static_cast<Acc<T>>(p.scale), lowest = static_cast<Acc<T>>(p.lowest),
             highest = static_cast<Acc<T>>(p.highest);
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; ++i) {
    put<T>(y + i, math::code(widen(weight<kMasked>(w, mask, i)), scale, lowest, highest), scale);
  }
}

// Rows of a pair or more. Values are clipped before the division, which gives the same codes and leaves no quotient
// that is not finite.
template <bool kMasked, typename T, typename Out>
AMCT_INLINE void symmetric_pairs(const T* w, const uint8_t* mask, Out* y, int64_t n, const Quotient<T>& quotient,
                                 const Symmetric& p) {
  using A = Acc<T>;
  const Row<A> scale = filled(static_cast<A>(p.scale)), bottom = filled(static_cast<A>(p.lowest)) * scale,
               top = filled(static_cast<A>(p.highest)) * scale;
  const auto code = [&](Row<A> v) __attribute__((always_inline)) { return rounded(quotient(clamped(v, bottom, top))); };
  const auto codes = [&](int64_t i) __attribute__((always_inline)) {
    const Pair<T> v = kMasked ? load_kept_pair(w + i, mask + i) : load_pair(w + i);
    return Pair<T>{code(v.first), code(v.second)};
  };
  const Pair<T> last = codes(n - kPair<T>);
  for (int64_t i = 0; i + kPair<T> <= n; i += kPair<T>) put_pair(y + i, codes(i), scale);
  put_pair(y + n - kPair<T>, last, scale);
}

// The same for half formats and results of that format: it is these that are clipped.
template <bool kMasked, typename T>
AMCT_INLINE void symmetric_halves(const T* w, const uint8_t* mask, T* y, int64_t n, const Quotient<T>& quotient,
                                  const Symmetric& p) {
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
    if (sound(i)) [[likely]] {
      store_between(y + i, values(i), bottom, top);
    } else {
      each(i, i + kPair<T>);
    }
  }
  if (whole) return each(i, n);
  store_between(y + n - kPair<T>, last, bottom, top);
}

// `y` may be the memory of w: a pair is written when it is done, and the last one, which may overlap the one in front
// of it, is read before anything is written.
template <bool kMasked, typename T, typename Out>
AMCT_INLINE void symmetric(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p) {
  const Quotient<T> quotient(static_cast<Acc<T>>(p.scale));
  if (!quotient.usable) return symmetric_each<kMasked>(w, mask, y, n, p);
  if constexpr (sizeof(Out) == 2) {
    if (n >= kPair<T>) return symmetric_halves<kMasked>(w, mask, y, n, quotient, p);
    T row[kPair<T>] = {};
    for (int64_t i = 0; i < n; ++i) row[i] = weight<kMasked>(w, mask, i);
    symmetric_halves<false>(row, nullptr, row, kPair<T>, quotient, p);
    for (int64_t i = 0; i < n; ++i) y[i] = row[i];
  } else {
    if (n >= kPair<T>) return symmetric_pairs<kMasked>(w, mask, y, n, quotient, p);
    symmetric_each<kMasked>(w, mask, y, n, p);
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

}  // namespace
}  // namespace amct_ext::cpu
