// Sums in float64 whose order of additions does not depend on the instruction set: element i of a row goes to a fixed
// lane, lanes are added up at the end. A row in several pieces must be cut at multiples of the lanes.
#pragma once

#include "cpu/isa/pairs.h"

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

// The lanes as vector types, which say what compilers fail to see in plain loops.
struct LaneSums {
  using Double8 = double __attribute__((vector_size(64)));
  using Float8 = float __attribute__((vector_size(32)));

  Double8 low = {}, high = {};

  AMCT_INLINE void add(const float* v) {
    Float8 first, second;
    __builtin_memcpy(&first, v, sizeof(first));
    __builtin_memcpy(&second, v + 8, sizeof(second));
#if defined(AMCT_AVX512)
    low += _mm512_maskz_cvtps_pd(-1, first);  // compilers make two halves of the general form
    high += _mm512_maskz_cvtps_pd(-1, second);
#else
    low += __builtin_convertvector(first, Double8);
    high += __builtin_convertvector(second, Double8);
#endif
  }

  AMCT_INLINE void add(const double* v) {
    Double8 first, second;
    __builtin_memcpy(&first, v, sizeof(first));
    __builtin_memcpy(&second, v + 8, sizeof(second));
    low += first;
    high += second;
  }

  AMCT_INLINE double total() const {
    double sum = 0;
    for (int i = 0; i < 8; ++i) sum += low[i];
    for (int i = 0; i < 8; ++i) sum += high[i];
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
    for (int lane = 0; lane < kGroup; ++lane) partial[lane] = 0;
  }
};

// The lane of element i of a group, such that a row of a pair has neighbouring lanes.
template <typename T>
constexpr int lane_of(int i) {
  return kAlternating<T> ? i / 2 + i % 2 * kLanes : i;
}

}  // namespace
}  // namespace amct_ext::cpu
