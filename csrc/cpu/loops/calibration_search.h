// Range search: histogram of magnitudes, and the exact error of candidates.
#pragma once

#include <type_traits>

#include "cpu/dispatch.h"
#include "simd/fixed_order_sum.h"

namespace amct_ext::cpu {
namespace {

constexpr int kStage = 1024;  // values staged in the first-level cache

template <typename T>
AMCT_INLINE int64_t stage(const T* x, int64_t begin, int64_t n, Acc<T>* values) {
  const int64_t count = n - begin < kStage ? n - begin : kStage;
  for (int64_t i = 0; i < count; ++i) values[i] = widen(x[begin + i]);
  return count;
}

// The largest value and the smallest one, zero included: with zero in, the largest bit pattern read as a signed number
// is the largest value, read as an unsigned one the smallest, whatever signs there are. Two integer maxima, NaN
// included.
template <typename T>
Range extremes(const void* x_, int64_t n) {
  using Unsigned = Bits<T>;
  using Signed = std::make_signed_t<Unsigned>;
  const T* __restrict x = static_cast<const T*>(x_);
  constexpr Unsigned infinity = Traits<T>::kInfinity, sign = Traits<T>::kSign;
  Signed high = 0;
  Unsigned low = sign;
  for (int64_t i = 0; i < n; ++i) {
    const Unsigned bits = as<Unsigned>(x[i]);
    high = static_cast<Signed>(bits) > high ? static_cast<Signed>(bits) : high;
    low = bits > low ? bits : low;
  }
  if (static_cast<Unsigned>(high) > infinity || static_cast<Unsigned>(low ^ sign) > infinity) {
    return {__builtin_nan(""), __builtin_nan("")};
  }
  return {static_cast<double>(widen(as<T>(static_cast<Unsigned>(high)))),
          0.0 - static_cast<double>(widen(as<T>(static_cast<Unsigned>(low ^ sign))))};
}

template <typename T>
void histogram(const void* x_, int64_t n, double scale, uint64_t* bins) {
  const T* x = static_cast<const T*>(x_);
  const Acc<T> factor = static_cast<Acc<T>>(scale);
  int32_t position[kStage];
  for (int64_t begin = 0; begin < n; begin += kStage) {
    const int64_t count = n - begin < kStage ? n - begin : kStage;
    for (int64_t i = 0; i < count; ++i) {
      const Acc<T> v = widen(x[begin + i]);
      position[i] = static_cast<int32_t>((v < Acc<T>(0) ? -v : v) * factor);
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t p = static_cast<uint32_t>(position[i]);
      bins[p >> kFractionBits] += kOne + (p & ((1u << kFractionBits) - 1));
    }
  }
}

// Float32 magnitudes by their upper bits: pairs of count and sum of the lower bits. What lies below `first` goes to bin
// 0.
template <typename T>
void octaves(const void* x_, int64_t n, uint32_t first, int cut, int64_t* bins) {
  const T* x = static_cast<const T*>(x_);
  const uint32_t origin = first - (1u << cut), rest = (1u << cut) - 1;
  uint32_t key[kStage];
  for (int64_t begin = 0; begin < n; begin += kStage) {
    const int64_t count = n - begin < kStage ? n - begin : kStage;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = as<uint32_t>(static_cast<float>(widen(x[begin + i]))) & 0x7fffffffu;
      key[i] = bits < first ? 0 : bits - origin;
    }
    for (int64_t i = 0; i < count; ++i) {
      int64_t* bin = bins + 2 * (key[i] >> cut);
      bin[0] += 1;
      bin[1] += key[i] & rest;
    }
  }
}

template <typename T>
void losses(const void* x_, int64_t n, const Candidate* candidates, int count, double* sums) {
  const T* x = static_cast<const T*>(x_);
  Acc<T> values[kStage];
  for (int64_t begin = 0; begin < n; begin += kStage) {
    const int64_t size = stage(x, begin, n, values);
    for (int c = 0; c < count; ++c) {
      const Acc<T> scale = static_cast<Acc<T>>(candidates[c].scale), end = static_cast<Acc<T>>(candidates[c].end);
      sums[c] += lane_sum(size, [&](int64_t i) __attribute__((always_inline)) {
        const Acc<T> v = values[i];
        const Acc<T> d = math::round_even(math::clamp(v, -end, end) / scale) * scale - v;
        return static_cast<double>(d * d);
      });
    }
  }
}

template <typename T>
void offset_losses(const void* x_, int64_t n, const Candidate* candidates, int count, double* sums) {
  const T* x = static_cast<const T*>(x_);
  Acc<T> values[kStage];
  for (int64_t begin = 0; begin < n; begin += kStage) {
    const int64_t size = stage(x, begin, n, values);
    for (int c = 0; c < count; ++c) {
      const math::Affine<Acc<T>> affine{static_cast<Acc<T>>(candidates[c].scale),
                                        static_cast<Acc<T>>(candidates[c].offset)};
      const Acc<T> lowest = static_cast<Acc<T>>(candidates[c].lowest),
                   highest = static_cast<Acc<T>>(candidates[c].highest);
      sums[c] += lane_sum(size, [&](int64_t i) __attribute__((always_inline)) {
        const Acc<T> d = math::fake_quantize(values[i], affine, lowest, highest) - values[i];
        return static_cast<double>(d * d);
      });
    }
  }
}

}  // namespace
}  // namespace amct_ext::cpu
