// Weights: the largest and the smallest value.
#pragma once

#include <type_traits>

#include "cpu/loop_params.h"
#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

template <bool kMasked, typename T>
Range range_by_value(const T* w, const uint8_t* mask, int64_t n) {
  Acc<T> largest = widen(load_element<kMasked>(w, mask, 0)), smallest = largest;
  for (int64_t i = 1; i < n; ++i) {
    const Acc<T> v = widen(load_element<kMasked>(w, mask, i));
    largest = v > largest ? v : largest;
    smallest = v < smallest ? v : smallest;
  }
  return {static_cast<double>(largest), static_cast<double>(smallest)};
}

// The range of values by two integer maxima. Bit patterns are ordered as the magnitudes: as signed integers the largest
// pattern is the largest value, as unsigned integers the smallest one, provided that there are values of both signs.
// NaN exceeds all.
template <typename T>
class RangeTracker {
 public:
  using Unsigned = Bits<T>;
  using Signed = std::make_signed_t<Unsigned>;

  // Two sets of lanes: taken in turns they halve the chain of dependent maxima.
  AMCT_INLINE void add(IVec<T> bits) { update(highs_, lows_, bits); }
  AMCT_INLINE void add_second(IVec<T> bits) { update(second_highs_, second_lows_, bits); }
  AMCT_INLINE void add(T value) {
    const auto bits = bit_cast<Unsigned>(value);
    high_ = max(high_, static_cast<Signed>(bits));
    low_ = max(low_, bits);
  }

  template <bool kMasked>
  AMCT_INLINE void add_all(const T* w, const uint8_t* mask, int64_t n) {
    const auto bits = [&](int64_t i) __attribute__((always_inline)) {
      if constexpr (kMasked) return load_masked(w + i, mask + i);
      return load_bits(w + i);
    };
    constexpr int width = kLanes<T>;
    int64_t i = 0;
    if (kHasIntegerMax) {
      for (; i + 2 * width <= n; i += 2 * width) {
        add(bits(i));
        add_second(bits(i + width));
      }
      if (i + width <= n) {
        add(bits(i));
        i += width;
      }
    }
    for (; i < n; ++i) add(load_element<kMasked>(w, mask, i));
  }

  // by_value() decides where all values have one sign.
  template <typename ByValue>
  AMCT_INLINE Range result(const ByValue& by_value) const {
    constexpr Unsigned infinity = Traits<T>::kInfBits, sign = Traits<T>::kSignBit;
    const IVec<T> highs = max(highs_, second_highs_);
    const UVec<T> lows = max(lows_, second_lows_);
    Signed high = high_;
    Unsigned low = low_;
    for (int l = 0; l < kLanes<T>; ++l) {
      high = max(high, static_cast<Signed>(highs[l]));
      low = max(low, static_cast<Unsigned>(lows[l]));
    }
    const bool negative = low >= sign, positive = high >= 0;
    if ((positive && static_cast<Unsigned>(high) > infinity) || (negative && (low ^ sign) > infinity)) {
      return {__builtin_nan(""), __builtin_nan("")};
    }
    if (!negative || !positive) return by_value();
    return {static_cast<double>(widen(bit_cast<T>(static_cast<Unsigned>(high)))),
            static_cast<double>(widen(bit_cast<T>(low)))};
  }

 private:
  static AMCT_INLINE void update(IVec<T>& highs, UVec<T>& lows, IVec<T> bits) {
    highs = max(highs, bits);
    lows = max(lows, bit_cast<UVec<T>>(bits));
  }

  static constexpr auto kLowest = static_cast<Signed>(Traits<T>::kSignBit);
  IVec<T> highs_ = IVec<T>{} + kLowest, second_highs_ = highs_;
  UVec<T> lows_ = {}, second_lows_ = {};
  Signed high_ = kLowest;
  Unsigned low_ = 0;
};

template <bool kMasked, typename T>
AMCT_INLINE Range range_of(const T* w, const uint8_t* mask, int64_t n) {
  RangeTracker<T> range;
  range.template add_all<kMasked>(w, mask, n);
  return range.result([&] { return range_by_value<kMasked>(w, mask, n); });
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
