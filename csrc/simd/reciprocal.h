// Rounding x / scale (+ offset) to an integer without a division: the product with the reciprocal is off by less than
// `margin` on the codes that count. So it rounds to the same integer unless it lies within `margin` of a tie, the
// middle between two integers. Loops track the largest distance from an integer over a step; where that reaches
// `max_safe_distance` they redo the step with the division. Results always have the bits of the division. The CUDA
// kernels do the same a value at a time (cuda/engine/round.cuh).
#pragma once

#include "simd/element.h"

namespace amct_ext::cpu {
namespace {

template <typename A>
struct Reciprocal {
  A inverse, max_safe_distance;
  bool usable;
};

template <typename A>
AMCT_INLINE Reciprocal<A> reciprocal(double scale, double lowest, double highest) {
  const double margin = 2 * static_cast<double>(math::epsilon<A>()) * (highest - lowest + 2);
  // Far from overflow and underflow, for which the bound does not hold.
  const bool ordinary = scale > 1e-30 && scale < 1e30;
  return {A(1) / static_cast<A>(scale), static_cast<A>(0.5 - margin), ordinary && margin < 0.01};
}

}  // namespace
}  // namespace amct_ext::cpu
