// Division of many half-precision values by one number, without dividing, where the quotient will be rounded to an
// integer. A third of such values lie on the middle between two integers of a round scale, so trying and dividing again
// would not pay.
//
// 1 / s is kept in two parts. v * high + v * low, rounded once, is off by at most half a unit in the last place and a
// 2^21st of one. The quotient hardly ever lies so close to where its rounding would become, or cease to be, the middle
// between two integers, so it rounds to the right integer. All fractions of s were tried with every v of 11 digits and
// quotients up to 2^17: one of them fails.
#pragma once

#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

class Quotient {
 public:
  AMCT_INLINE explicit Quotient(float divisor) : divisor_(filled(divisor)) {
    constexpr uint32_t fraction = ~(Traits<float>::kSign | Traits<float>::kInfinity);
    usable = divisor >= 1.1920928955078125e-07f && divisor <= 1e18f;  // far from overflow and underflow
    if ((as<uint32_t>(divisor) & fraction) == 0x1df1ff) usable = false;
#if defined(__FP_FAST_FMA)
    const float inverse = 1.0f / divisor;
    // Not above 1 / s: the rest is then not negative, and the sum of two products of -0 stays -0.
    const bool above = fused(inverse, divisor, -1.0f) > 0;
    const float high = above ? as<float>(as<uint32_t>(inverse) - 1) : inverse;
    high_ = filled(high);
    low_ = filled(fused(-high, divisor, 1.0f) * inverse);
#endif
  }

  // A number that rounds to the same integer, for finite values.
  AMCT_INLINE Row<float> operator()(Row<float> v) const {
#if defined(__FP_FAST_FMA)
    return fused(v, high_, v * low_);
#else
    return v / divisor_;
#endif
  }

  bool usable;

 private:
  Row<float> divisor_, high_, low_;
};

}  // namespace
}  // namespace amct_ext::cpu
