// Sums in float64 whose order of additions does not depend on the instruction set: element i is added to partial sum
// i mod kSumLanes, and the partial sums are added up at the end. Data in several pieces must be cut at multiples of
// kSumLanes.
#pragma once

#include "simd/vec2.h"

namespace amct_ext::cpu {
namespace {

constexpr int kSumLanes = 16;

// The sum of term(i) for i in [0, n).
template <typename Term>
AMCT_INLINE double fixed_order_sum(int64_t n, Term term) {
  double sums[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) sums[l] += term(i + l);
  }
  for (int l = 0; i < n; ++i, ++l) sums[l] += term(i);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// The partial sums in vectors, for loops that compilers do not vectorise.
struct SumLanes {
  static constexpr int kVecs = kSumLanes / kLanes<double>;
  Vec<double> vecs[kVecs] = {};

  template <typename A>
  AMCT_INLINE void add(const A* v) {
    for (int i = 0; i < kVecs; ++i) vecs[i] += load_double(v + i * kLanes<double>);
  }

  AMCT_INLINE double total() const {
    double sum = 0;
    for (int lane = 0; lane < kSumLanes; ++lane) sum += vecs[lane / kLanes<double>][lane % kLanes<double>];
    return sum;
  }
};

// Summation in two levels: 32 partial sums in the arithmetic type take at most kSteps values each, then `flush` adds
// them to float64. What a lane holds, and so the order of additions, does not depend on the width of a vector.
template <typename A>
struct CascadeSum {
  static constexpr int kWidth = 2 * kSumLanes, kSteps = 8;
  alignas(64) A partial[kWidth] = {};
  SumLanes sums;

  AMCT_INLINE void add(int lane, Vec<A> v) { store(partial + lane, load<Vec<A>>(partial + lane) + v); }

  AMCT_INLINE void flush() {
    for (int lane = 0; lane < kWidth; lane += kSumLanes) sums.add(partial + lane);
    for (int lane = 0; lane < kWidth; lane += kLanes<A>) store(partial + lane, Vec<A>{});
  }
};

// The lane of element i of kWidth, such that a vector of a Vec2 has neighbouring lanes.
template <typename T>
constexpr int lane_of(int i) {
  return kInterleaved<T> ? i / 2 + i % 2 * kSumLanes : i;
}

}  // namespace
}  // namespace amct_ext::cpu
