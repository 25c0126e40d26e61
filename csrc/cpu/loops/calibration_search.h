// Range search: histograms of magnitudes, and the exact error of candidate ranges.
#pragma once

#include <type_traits>

#include "cpu/loop_params.h"
#include "simd/fixed_order_sum.h"

namespace amct_ext::cpu {
namespace {

constexpr int kSearchChunk = 1024;  // values whose intermediate results stay in the L1 cache

// Widens up to a chunk of values from `begin` on; returns how many.
template <typename T>
AMCT_INLINE int64_t widen_chunk(const T* x, int64_t begin, int64_t n, Acc<T>* values) {
  const int64_t count = n - begin < kSearchChunk ? n - begin : kSearchChunk;
  for (int64_t i = 0; i < count; ++i) values[i] = widen(x[begin + i]);
  return count;
}

// The largest and the smallest value, zero included. As signed integers the largest bit pattern is the largest value
// (at least +0); as unsigned integers it is the smallest one (at least -0). So two integer maxima do it, and they find
// NaN.
template <typename T>
Range range_with_zero(const void* x_, int64_t n) {
  using Unsigned = Bits<T>;
  using Signed = std::make_signed_t<Unsigned>;
  const T* __restrict x = static_cast<const T*>(x_);
  constexpr Unsigned infinity = Traits<T>::kInfBits, sign = Traits<T>::kSignBit;
  Signed high = 0;
  Unsigned low = sign;
  for (int64_t i = 0; i < n; ++i) {
    const Unsigned bits = bit_cast<Unsigned>(x[i]);
    high = static_cast<Signed>(bits) > high ? static_cast<Signed>(bits) : high;
    low = bits > low ? bits : low;
  }
  if (static_cast<Unsigned>(high) > infinity || static_cast<Unsigned>(low ^ sign) > infinity) {
    return {__builtin_nan(""), __builtin_nan("")};
  }
  return {static_cast<double>(widen(bit_cast<T>(static_cast<Unsigned>(high)))),
          0.0 - static_cast<double>(widen(bit_cast<T>(static_cast<Unsigned>(low ^ sign))))};
}

// Fine histogram with bins of equal width; position = |v| * scale.
template <typename T>
void histogram(const void* x_, int64_t n, double scale, uint64_t* bins) {
  const T* x = static_cast<const T*>(x_);
  const Acc<T> factor = static_cast<Acc<T>>(scale);
  int32_t position[kSearchChunk];
  for (int64_t begin = 0; begin < n; begin += kSearchChunk) {
    const int64_t count = n - begin < kSearchChunk ? n - begin : kSearchChunk;
    for (int64_t i = 0; i < count; ++i) {
      const Acc<T> v = widen(x[begin + i]);
      position[i] = static_cast<int32_t>((v < Acc<T>(0) ? -v : v) * factor);
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t p = static_cast<uint32_t>(position[i]);
      bins[p >> kFractionBits] += kCountOne + (p & ((1u << kFractionBits) - 1));
    }
  }
}

// Histogram with bins of equal relative width: float32 magnitudes by their bit patterns without the lowest
// `dropped_bits`. A bin is a count and the sum of the dropped bits. Patterns below `first_bits` go to bin 0. Values
// below zero, where they are to be kept apart, go to bins that begin `negative` numbers further on.
template <typename T, bool kSigned>
AMCT_INLINE void add_to_bins(const void* x_, int64_t n, uint32_t first_bits, int dropped_bits, int64_t* bins,
                             int64_t negative) {
  constexpr uint32_t sign = 0x80000000u;  // higher than any key
  const T* x = static_cast<const T*>(x_);
  const uint32_t origin = first_bits - (1u << dropped_bits), low_mask = (1u << dropped_bits) - 1;
  uint32_t key[kSearchChunk];
  for (int64_t begin = 0; begin < n; begin += kSearchChunk) {
    const int64_t count = n - begin < kSearchChunk ? n - begin : kSearchChunk;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t all = bit_cast<uint32_t>(static_cast<float>(widen(x[begin + i]))), bits = all & ~sign;
      key[i] = bits < first_bits ? 0 : bits - origin;
      if constexpr (kSigned) key[i] |= all > sign ? sign : 0;  // -0 is not below zero
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t magnitude = kSigned ? key[i] & ~sign : key[i];
      int64_t* bin = bins + 2 * (magnitude >> dropped_bits) + (kSigned && (key[i] & sign) ? negative : 0);
      bin[0] += 1;
      bin[1] += magnitude & low_mask;
    }
  }
}

template <typename T>
void range_histogram(const void* x, int64_t n, uint32_t first_bits, int dropped_bits, int64_t* bins) {
  add_to_bins<T, false>(x, n, first_bits, dropped_bits, bins, 0);
}

template <typename T>
void signed_range_histogram(const void* x, int64_t n, uint32_t first_bits, int dropped_bits, int64_t* bins,
                            int64_t negative) {
  add_to_bins<T, true>(x, n, first_bits, dropped_bits, bins, negative);
}

// Adds the squared error of each symmetric candidate range.
template <typename T>
void losses(const void* x_, int64_t n, const Candidate* candidates, int count, double* sums) {
  const T* x = static_cast<const T*>(x_);
  Acc<T> values[kSearchChunk];
  for (int64_t begin = 0; begin < n; begin += kSearchChunk) {
    const int64_t size = widen_chunk(x, begin, n, values);
    for (int c = 0; c < count; ++c) {
      const Acc<T> scale = static_cast<Acc<T>>(candidates[c].scale), end = static_cast<Acc<T>>(candidates[c].end);
      sums[c] += fixed_order_sum(size, [&](int64_t i) __attribute__((always_inline)) {
        const Acc<T> v = values[i];
        const Acc<T> d = math::round_even(math::clamp(v, -end, end) / scale) * scale - v;
        return static_cast<double>(d * d);
      });
    }
  }
}

// Adds the squared error of each candidate range with an offset.
template <typename T>
void offset_losses(const void* x_, int64_t n, const Candidate* candidates, int count, double* sums) {
  const T* x = static_cast<const T*>(x_);
  Acc<T> values[kSearchChunk];
  for (int64_t begin = 0; begin < n; begin += kSearchChunk) {
    const int64_t size = widen_chunk(x, begin, n, values);
    for (int c = 0; c < count; ++c) {
      const math::Affine<Acc<T>> affine{static_cast<Acc<T>>(candidates[c].scale),
                                        static_cast<Acc<T>>(candidates[c].offset)};
      const Acc<T> lowest = static_cast<Acc<T>>(candidates[c].lowest),
                   highest = static_cast<Acc<T>>(candidates[c].highest);
      sums[c] += fixed_order_sum(size, [&](int64_t i) __attribute__((always_inline)) {
        const Acc<T> d = math::fake_quantize(values[i], affine, lowest, highest) - values[i];
        return static_cast<double>(d * d);
      });
    }
  }
}

}  // namespace
}  // namespace amct_ext::cpu
