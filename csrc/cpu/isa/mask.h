// 2:4 masks. The rule is stated in amct_ext/ops/masks.py; magnitudes are compared as bit patterns, which orders NaN
// last.
#pragma once

#include "cpu/isa/scalar.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

template <typename T>
struct Kept {
  bool a, b, c, d;
};

// All NaN are equal and larger than infinity.
template <typename T>
AMCT_INLINE Bits<T> order(T v) {
  const Bits<T> bits = magnitude_bits(v);
  constexpr Bits<T> nan = Traits<T>::kInfinity + 1;
  return bits > nan ? nan : bits;
}

template <typename B>
AMCT_INLINE Kept<B> kept_of_four(B a, B b, B c, B d) {
  // x_y: of equals the earlier one wins.
  const int a_b = a >= b, a_c = a >= c, a_d = a >= d, b_c = b >= c, b_d = b >= d, c_d = c >= d;
  const int keep_a = a_b + a_c + a_d >= 2, keep_b = (1 - a_b) + b_c + b_d >= 2,
            keep_c = (1 - a_c) + (1 - b_c) + c_d >= 2, keep_d = (1 - a_d) + (1 - b_d) + (1 - c_d) >= 2;
  const int first_smallest = (1 - a_b) & (1 - a_c) & (1 - a_d);
  const int all_equal = (b == c) & (c == d);
  const int drop_b = (b <= c) & (b <= d) & (1 - all_equal);
  const int drop_c = ((c < b) & (c <= d)) | all_equal;
  const int rest = 1 - first_smallest;
  return {static_cast<bool>(rest & keep_a), static_cast<bool>((rest & keep_b) | (first_smallest & (1 - drop_b))),
          static_cast<bool>((rest & keep_c) | (first_smallest & (1 - drop_c))),
          static_cast<bool>((rest & keep_d) | (first_smallest & (drop_b | drop_c)))};
}

template <typename T>
AMCT_INLINE T masked(T v, bool keep) {
  const Bits<T> bits = as<Bits<T>>(v);
  return as<T>(static_cast<Bits<T>>(keep ? bits : Bits<T>(0)));
}

// One group whose rows lie `inner` values apart; rows beyond `rows` are zeros.
template <typename T, bool Apply>
void mask_group(const T* w, uint8_t* mask, T* y, int64_t inner, int rows) {
  const T zero = narrow<T>(Acc<T>(0));
  for (int64_t i = 0; i < inner; ++i) {
    const T a = w[i], b = rows > 1 ? w[i + inner] : zero, c = rows > 2 ? w[i + 2 * inner] : zero,
            d = rows > 3 ? w[i + 3 * inner] : zero;
    const auto keep = kept_of_four(order(a), order(b), order(c), order(d));
    const bool kept[4] = {keep.a, keep.b, keep.c, keep.d};
    const T values[4] = {a, b, c, d};
    for (int r = 0; r < rows; ++r) {
      mask[i + r * inner] = kept[r];
      if (Apply) y[i + r * inner] = masked(values[r], kept[r]);
    }
  }
}

template <typename T, bool Apply>
void mask_rows(const Plane& p) {
  const T* w = static_cast<const T*>(p.w);
  T* y = static_cast<T*>(p.y);
  if (p.count <= 2) {
    const int64_t n = p.count * p.inner;
    for (int64_t i = 0; i < n; ++i) p.mask[i] = 1;
    if (Apply) __builtin_memcpy(y, w, sizeof(T) * n);
    return;
  }
  for (int64_t first = 0; first < p.count; first += 4) {
    const int rows = p.count - first < 4 ? static_cast<int>(p.count - first) : 4;
    const int64_t at = first * p.inner;
    mask_group<T, Apply>(w + at, p.mask + at, Apply ? y + at : nullptr, p.inner, rows);
  }
}

template <typename T>
void mask_plane(const Plane& p) {
  if (p.y) {
    mask_rows<T, true>(p);
  } else {
    mask_rows<T, false>(p);
  }
}

template <typename T>
void apply_mask(const void* w_, const uint8_t* __restrict mask, void* y_, int64_t n) {
  const T* __restrict w = static_cast<const T*>(w_);
  T* __restrict y = static_cast<T*>(y_);
  for (int64_t i = 0; i < n; ++i) y[i] = masked(w[i], mask[i] != 0);
}

}  // namespace
}  // namespace amct_ext::cpu
