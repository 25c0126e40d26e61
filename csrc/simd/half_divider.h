// Division of many half-precision values by one number, without dividing, where the quotient will be rounded to an
// integer. Such quotients are often ties, so a product with the reciprocal alone would often be redone by division.
//
// 1 / divisor is kept in two parts. v * high + v * low, rounded once, differs from the exact quotient by at most half a
// unit in the last place and 2^-21 of one. So it rounds to the same integer as the division, unless the quotient lies
// that close to where the division's result steps onto a tie or off it. tests/native/half_divider.cpp tries every such
// divisor and value of 11 significant bits, with quotients up to 2^16: one fraction of the divisor fails. Codes have at
// most 16 bits, so larger quotients are clamped.
#pragma once

#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

class HalfDivider {
 public:
  AMCT_INLINE explicit HalfDivider(float divisor) : divisor_(broadcast(divisor)) {
    constexpr uint32_t kFractionBits = ~(Traits<float>::kSignBit | Traits<float>::kInfBits);
    usable = divisor >= math::epsilon<float>() && divisor <= 1e18f;  // far from overflow and underflow
    if ((bit_cast<uint32_t>(divisor) & kFractionBits) == kExcludedFraction) usable = false;
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

  static constexpr uint32_t kExcludedFraction = 0x1df1ff;  // quotients next to a tie may round to its other side
  bool usable;

 private:
  Vec<float> divisor_, high_, low_;
};

}  // namespace
}  // namespace amct_ext::cpu
