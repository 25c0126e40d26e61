// Weights: largest and smallest.
#pragma once

#include <type_traits>

#include "cpu/dispatch.h"
#include "simd/vec_types.h"

namespace amct_ext::cpu {
namespace {

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
template <typename T>
class Extremes {
 public:
  using Unsigned = Bits<T>;
  using Signed = std::make_signed_t<Unsigned>;

  // One register at a time into either of two sets of lanes, for a maximum waits for the one before.
  AMCT_INLINE void add(V<T> bits) { join(highs_, lows_, bits); }
  AMCT_INLINE void add_other(V<T> bits) { join(other_highs_, other_lows_, bits); }
  AMCT_INLINE void add(T value) {
    const auto bits = as<Unsigned>(value);
    high_ = larger(high_, static_cast<Signed>(bits));
    low_ = larger(low_, bits);
  }

  template <bool kMasked>
  AMCT_INLINE void add_all(const T* w, const uint8_t* mask, int64_t n) {
    const auto bits = [&](int64_t i) __attribute__((always_inline)) {
      if constexpr (kMasked) return load_kept(w + i, mask + i);
      return load(w + i);
    };
    constexpr int width = kWidth<T>;
    int64_t i = 0;
    if (kMaxima) {
      for (; i + 2 * width <= n; i += 2 * width) {
        add(bits(i));
        add_other(bits(i + width));
      }
      if (i + width <= n) {
        add(bits(i));
        i += width;
      }
    }
    for (; i < n; ++i) add(weight<kMasked>(w, mask, i));
  }

  // by_value() where all have one sign.
  template <typename ByValue>
  AMCT_INLINE Range result(const ByValue& by_value) const {
    constexpr Unsigned infinity = Traits<T>::kInfinity, sign = Traits<T>::kSign;
    const V<T> highs = larger(highs_, other_highs_);
    const U<T> lows = larger(lows_, other_lows_);
    Signed high = high_;
    Unsigned low = low_;
    for (int l = 0; l < kWidth<T>; ++l) {
      high = larger(high, static_cast<Signed>(highs[l]));
      low = larger(low, static_cast<Unsigned>(lows[l]));
    }
    const bool negative = low >= sign, positive = high >= 0;
    if ((positive && static_cast<Unsigned>(high) > infinity) || (negative && (low ^ sign) > infinity)) {
      return {__builtin_nan(""), __builtin_nan("")};
    }
    if (!negative || !positive) return by_value();
    return {static_cast<double>(widen(as<T>(static_cast<Unsigned>(high)))), static_cast<double>(widen(as<T>(low)))};
  }

 private:
  static AMCT_INLINE void join(V<T>& highs, U<T>& lows, V<T> bits) {
    highs = larger(highs, bits);
    lows = larger(lows, as<U<T>>(bits));
  }

  static constexpr auto kLowest = static_cast<Signed>(Traits<T>::kSign);
  V<T> highs_ = V<T>{} + kLowest, other_highs_ = highs_;
  U<T> lows_ = {}, other_lows_ = {};
  Signed high_ = kLowest;
  Unsigned low_ = 0;
};

template <bool kMasked, typename T>
AMCT_INLINE Range range_of(const T* w, const uint8_t* mask, int64_t n) {
  Extremes<T> extremes;
  extremes.template add_all<kMasked>(w, mask, n);
  return extremes.result([&] { return range_by_value<kMasked>(w, mask, n); });
}

template <typename T>
Range range(const void* w, int64_t n) {
  return range_of<false>(static_cast<const T*>(w), nullptr, n);
}

template <typename T>
Range masked_range(const void* w, const uint8_t* mask, int64_t n) {
  return range_of<true>(static_cast<const T*>(w), mask, n);
}

}  // namespace
}  // namespace amct_ext::cpu
