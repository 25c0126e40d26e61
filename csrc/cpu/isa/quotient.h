// Division of many values by one number, without dividing: the same quotients, bit for bit. For finite values and NaN.
//
// 1 / s is kept in two parts. v * high + v * low, rounded once, is off by at most half a unit in the last place and a
// 2^21st of one. The quotient of a half-precision v hardly ever lies so close to where its rounding would become, or
// cease to be, the middle between two integers, so it rounds to the right integer. All fractions of s were tried with
// every v of 11 digits and quotients up to 2^17: one of them fails. Other types correct it once more, by the remainder
// (Markstein 1990), which gives the quotient itself, unless v is so small that the remainder underflows: that rounds to
// zero, with the sign of v.
#pragma once

#include "cpu/isa/rows.h"

namespace amct_ext::cpu {
namespace {

template <typename T>
class Quotient {
 public:
  using A = Acc<T>;

  AMCT_INLINE explicit Quotient(A divisor) : divisor_(filled(divisor)) {
    constexpr auto fraction = static_cast<Bits<A>>(~(Traits<A>::kSign | Traits<A>::kInfinity));
    const auto part = as<Bits<A>>(divisor) & fraction;
    usable = divisor >= A(1.1920928955078125e-07) && divisor <= A(1e18);  // far from overflow and underflow
    if (sizeof(T) == 2 && part == 0x1df1ff) usable = false;
#if defined(__FP_FAST_FMA)
    const A inverse = A(1) / divisor;
    // Not above 1 / s: the rest is then not negative, and the sum of two products of -0 stays -0.
    const bool above = fused(inverse, divisor, A(-1)) > 0;
    const A high = above ? as<A>(static_cast<Bits<A>>(as<Bits<A>>(inverse) - 1)) : inverse;
    high_ = filled(high);
    low_ = filled(fused(-high, divisor, A(1)) * inverse);
    minus_inverse_ = filled(-inverse);
#endif
  }

  // Half formats: a number that rounds to the same integer.
  AMCT_INLINE Row<A> operator()(Row<A> v) const {
#if defined(__FP_FAST_FMA)
    const Row<A> near = fused(v, high_, v * low_);
    if constexpr (sizeof(T) == 2) return near;
    return fused(fused(near, divisor_, -v), minus_inverse_, near);
#else
    return v / divisor_;
#endif
  }

  bool usable;

 private:
  Row<A> divisor_, high_, low_, minus_inverse_;
};

}  // namespace
}  // namespace amct_ext::cpu
