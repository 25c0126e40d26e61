// round_even(v / scale + offset) without a division for most v.
#pragma once

#include "cuda/engine/launch.cuh"

namespace amct_ext::cuda {

// The product with the reciprocal is off by less than `near` on the codes that count, so it rounds to the same integer
// unless it lies that close to the middle between two. There the division decides: the bits are always its own.
template <typename A, bool kOffset>
struct Nearest {
  A scale, offset, inverse, limit;

  AMCT_INLINE static Nearest of(A scale, A offset, int num_bits) {
    constexpr A kUlp = std::is_same_v<A, double> ? A(2.220446049250313e-16) : A(1.1920928955078125e-07);
    const A near = 4 * kUlp * static_cast<A>((1LL << num_bits) + 1);
    // Far from overflow and underflow, for which the bound does not hold; a limit of zero always divides.
    const bool usable = scale > A(1e-30) && scale < A(1e30) && near < A(0.01);
    return {scale, offset, A(1) / scale, usable ? A(0.5) - near : A(0)};
  }

  AMCT_INLINE A operator()(A v) const {
    const A product = kOffset ? v * inverse + offset : v * inverse;
    const A code = math::round_even(product), distance = product - code;
    if (distance < limit && distance > -limit) return code;
    return math::round_even(kOffset ? v / scale + offset : v / scale);
  }
};

}  // namespace amct_ext::cuda
