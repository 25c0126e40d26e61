// round_even(v / scale + offset), bit for bit, by a multiplication instead of a division for most v.
#pragma once

#include "cuda/engine/memory.cuh"

namespace amct_ext::cuda {

// v * (1 / scale) differs from v / scale by less than `error` for all quotients within the code range. Both round to
// the same integer unless the product lies within `error` of a tie; only then is the division computed. The
// CPU loops do the same a step at a time (simd/reciprocal.h).
template <typename A, bool kOffset>
struct RoundedQuotient {
  A scale, offset, inverse;
  A max_safe_distance;  // products closer than this to their integer are safe: 0.5 - error

  AMCT_INLINE static RoundedQuotient of(A scale, A offset, int num_bits) {
    const A error = 4 * math::epsilon<A>() * static_cast<A>((1LL << num_bits) + 1);
    // The bound does not hold near overflow and underflow. With a distance of zero every value is divided.
    const bool usable = scale > A(1e-30) && scale < A(1e30) && error < A(0.01);
    return {scale, offset, A(1) / scale, usable ? A(0.5) - error : A(0)};
  }

  AMCT_INLINE A operator()(A v) const {
    const A product = kOffset ? v * inverse + offset : v * inverse;
    const A code = math::round_even(product), distance = product - code;
    if (distance < max_safe_distance && distance > -max_safe_distance) return code;
    return math::round_even(kOffset ? v / scale + offset : v / scale);
  }
};

}  // namespace amct_ext::cuda
