// Division of many half-precision values by one number, without dividing, where the quotient will be rounded to an
// integer. A third of such values are ties of a round scale, so trying a reciprocal and dividing again would not pay.
//
// 1 / s is kept in two parts. v * high + v * low, rounded once, is off by at most half a unit in the last place and a
// 2^21st of one. That hardly ever moves a quotient onto a tie or off it, so it rounds to the right integer. All
// fractions of s were tried with every v of 11 digits and quotients up to 2^17: one fraction fails and is excluded.
#pragma once

#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

class Quotient {
 public:
  AMCT_INLINE explicit Quotient(float divisor) : divisor_(broadcast(divisor)) {
    constexpr uint32_t fraction = ~(Traits<float>::kSignBit | Traits<float>::kInfBits);
    usable = divisor >= 1.1920928955078125e-07f && divisor <= 1e18f;  // far from overflow and underflow
    if ((bit_cast<uint32_t>(divisor) & fraction) == 0x1df1ff) usable = false;
    if constexpr (kHasFma) {
      const float inverse = 1.0f / divisor;
      // Not above 1 / s: the rest is then not negative, and the sum of two products of -0 stays -0.
      const bool above = fma(inverse, divisor, -1.0f) > 0;
      const float high = above ? bit_cast<float>(bit_cast<uint32_t>(inverse) - 1) : inverse;
      high_ = broadcast(high);
      low_ = broadcast(fma(-high, divisor, 1.0f) * inverse);
    }
  }

  // A number that rounds to the same integer as v / divisor, for finite v.
  AMCT_INLINE Vec<float> operator()(Vec<float> v) const {
    if constexpr (kHasFma) return fma(v, high_, v * low_);
    return v / divisor_;
  }

  bool usable;

 private:
  Vec<float> divisor_, high_, low_;
};

}  // namespace
}  // namespace amct_ext::cpu
