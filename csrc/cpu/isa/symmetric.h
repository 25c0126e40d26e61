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
template <typename T>
AMCT_INLINE void put_pair(T* y, Pair<T> code, Row<Acc<T>> scale) {
  store_pair(y, Pair<T>{code.first * scale, code.second * scale});
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

// A pair at a time, each written when it is done: `y` may be the memory of w. Values are clipped before the division,
// which gives the same codes and leaves no quotient that is not finite.
template <bool kMasked, typename T, typename Out>
AMCT_INLINE void symmetric(const T* w, const uint8_t* mask, Out* y, int64_t n, const Symmetric& p) {
  using A = Acc<T>;
  const Quotient<T> quotient(static_cast<A>(p.scale));
  if (!quotient.usable) return symmetric_each(w, mask, y, n, p);
  const Row<A> scale = filled(static_cast<A>(p.scale)), bottom = filled(static_cast<A>(p.lowest)) * scale,
               top = filled(static_cast<A>(p.highest)) * scale;
  const auto code = [&](Row<A> v) __attribute__((always_inline)) { return rounded(quotient(clamped(v, bottom, top))); };
  int64_t i = 0;
  for (; i + kPair<T> <= n; i += kPair<T>) {
    const Pair<T> v = kMasked ? load_kept_pair(w + i, mask + i) : load_pair(w + i);
    const Pair<T> codes{code(v.first), code(v.second)};
    if (sizeof(Out) == 2 && holds_nan(codes)) [[unlikely]] {
      symmetric_each(w + i, kMasked ? mask + i : nullptr, y + i, kPair<T>, p);
    } else {
      put_pair<T>(y + i, codes, scale);
    }
  }
  symmetric_each(w + i, kMasked ? mask + i : nullptr, y + i, n - i, p);
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
