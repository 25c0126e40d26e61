// ULQ: the 8-bit codes of an activation, the same as those of the fake quantisation in activation_ulq.h.
#pragma once

#include "cpu/loops/activation_ulq.h"
#include "simd/reciprocal.h"

namespace amct_ext::cpu {
namespace {

// Values per step; a step with a value too close to a tie is redone by division. Half formats hold few different
// values, so ties are frequent and steps shorter.
template <typename T>
constexpr int64_t kCodesStep = sizeof(T) == 2 ? 64 : 256;

// Clamped before it is converted, so that the conversion is defined; NaN becomes the lowest code.
template <typename A>
AMCT_INLINE uint8_t code_byte(A code, A lowest, A highest) {
  code = code > lowest ? code : lowest;
  code = code < highest ? code : highest;
  return static_cast<uint8_t>(static_cast<int32_t>(code) + 128);
}

template <typename T>
AMCT_INLINE Bits<Acc<T>> codes_fast(const T* __restrict x, uint8_t* __restrict y, int64_t n, Acc<T> offset,
                                    Acc<T> inverse, Acc<T> lowest, Acc<T> highest) {
  Bits<Acc<T>> max_distance = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc<T> t = widen(x[i]) * inverse + offset, code = math::round_even(t);
    const Bits<Acc<T>> distance = abs_bits(t - code);
    max_distance = distance > max_distance ? distance : max_distance;
    y[i] = code_byte(code, lowest, highest);
  }
  return max_distance;
}

template <typename T>
bool ulq_codes(const void* x_, uint8_t* y, int64_t n, const UlqForwardParams& p) {
  const T* x = static_cast<const T*>(x_);
  const Acc<T> scale = static_cast<Acc<T>>(p.scale), offset = static_cast<Acc<T>>(p.offset),
               lowest = static_cast<Acc<T>>(p.lowest), highest = static_cast<Acc<T>>(p.highest);
  const auto recip = reciprocal<Acc<T>>(p.scale, p.lowest, p.highest);
  const auto max_safe_distance = bit_cast<Bits<Acc<T>>>(recip.max_safe_distance);
  bool good = true;
  for (int64_t begin = 0; begin < n; begin += kCodesStep<T>) {
    const int64_t count = n - begin < kCodesStep<T> ? n - begin : kCodesStep<T>;
    const T* __restrict in = x + begin;
    uint8_t* __restrict out = y + begin;
    // The distance of a value that is not finite is NaN, whose bits exceed those of any bound.
    if (recip.usable && codes_fast(in, out, count, offset, recip.inverse, lowest, highest) < max_safe_distance)
      continue;
    good &= all_finite(in, count);
    for (int64_t i = 0; i < count; ++i) {
      out[i] = code_byte(math::round_even(widen(in[i]) / scale + offset), lowest, highest);
    }
  }
  return !good;
}

using Bytes = uint8_t __attribute__((vector_size(16)));

// As the unpack instructions: the lower (upper) halves of a and b, interleaved.
AMCT_INLINE Bytes unpack_low(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
AMCT_INLINE Bytes unpack_high(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

AMCT_INLINE void transpose_16x16(const uint8_t* from, int64_t stride, uint8_t* to, int64_t width) {
  Bytes a[16], b[16];
  for (int r = 0; r < 16; ++r) __builtin_memcpy(&a[r], from + r * stride, 16);
  // Four perfect shuffles of rows r and r + 8.
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < 8; ++r) {
      b[2 * r] = unpack_low(a[r], a[r + 8]);
      b[2 * r + 1] = unpack_high(a[r], a[r + 8]);
    }
    for (int r = 0; r < 8; ++r) {
      a[2 * r] = unpack_low(b[r], b[r + 8]);
      a[2 * r + 1] = unpack_high(b[r], b[r + 8]);
    }
  }
  for (int r = 0; r < 16; ++r) __builtin_memcpy(to + r * width, &a[r], 16);
}

// to[p * width + c] = from[c * stride + p] for `rows` (a multiple of sixteen) rows c and n columns p, in blocks of 16 x
// 16 bytes.
void transpose_bytes(const uint8_t* from, int64_t stride, int rows, uint8_t* to, int64_t width, int64_t n) {
  int64_t p = 0;
  for (; p + 16 <= n; p += 16) {
    for (int r = 0; r < rows; r += 16) transpose_16x16(from + r * stride + p, stride, to + p * width + r, width);
  }
  for (; p < n; ++p) {
    for (int r = 0; r < rows; ++r) to[p * width + r] = from[r * stride + p];
  }
}

}  // namespace
}  // namespace amct_ext::cpu
