// Sums in float64 whose order of additions does not depend on the instruction set: element i of a row goes to a fixed
// lane, lanes are added up at the end. A row in several pieces must be cut at multiples of the lanes.
#pragma once

#include "simd/vec2.h"

namespace amct_ext::cpu {
namespace {

constexpr int kLanes = 16;

// The sum of term(i).
template <typename Term>
AMCT_INLINE double lane_sum(int64_t n, Term term) {
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += term(i + l);
  }
  for (int l = 0; i < n; ++i, ++l) sums[l] += term(i);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// The lanes as registers, which compilers fail to see in plain loops.
struct LaneSums {
  static constexpr int kParts = kLanes / kRow<double>;
  Row<double> parts[kParts] = {};

  template <typename A>
  AMCT_INLINE void add(const A* v) {
    for (int p = 0; p < kParts; ++p) parts[p] += doubles(v + p * kRow<double>);
  }

  AMCT_INLINE double total() const {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += parts[lane / kRow<double>][lane % kRow<double>];
    return sum;
  }
};

// Sums over the 32 lanes of a group: a few values in the arithmetic type, those in float64. What a lane holds, and so
// the order of additions, does not depend on the width of a row.
template <typename A>
struct GroupSums {
  static constexpr int kGroup = 2 * kLanes, kSteps = 8;
  alignas(64) A partial[kGroup] = {};
  LaneSums sums;

  AMCT_INLINE void add(int lane, Row<A> v) { store_row(partial + lane, load_row<Row<A>>(partial + lane) + v); }

  AMCT_INLINE void flush() {
    for (int lane = 0; lane < kGroup; lane += kLanes) sums.add(partial + lane);
    for (int lane = 0; lane < kGroup; lane += kRow<A>) store_row(partial + lane, Row<A>{});
  }
};

// The lane of element i of a group, such that a row of a pair has neighbouring lanes.
template <typename T>
constexpr int lane_of(int i) {
  return kAlternating<T> ? i / 2 + i % 2 * kLanes : i;
}

}  // namespace
}  // namespace amct_ext::cpu
