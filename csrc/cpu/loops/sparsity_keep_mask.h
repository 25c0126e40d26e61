// What a 2:4 mask keeps of four vectors that hold the members of as many groups as a vector has lanes. The rule is
// stated in amct_ext/ops/sparsity_mask.py; magnitudes are compared as bit patterns, which orders NaN last.
#pragma once

#include "simd/keep_mask.h"
#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

// Bitwise: set where two of the three are.
template <typename V>
AMCT_INLINE V majority(V a, V b, V c) {
  return (a & b) | (c & (a | b));
}

// What is kept of groups whose members lie in four vectors, ties included. A value is kept that goes before two others:
// the larger goes before the smaller, of equals the first goes first. But where the first of the four is the only
// smallest one, of equals the last goes first, and of three equals the middle one last.
template <typename V>
AMCT_INLINE void keep_2of4_exact(const V* m, V* keep) {
  const V a_b = m[0] >= m[1], a_c = m[0] >= m[2], a_d = m[0] >= m[3];
  const V usual = a_b | a_c | a_d;             // -1 where the first is not the only smallest one
  const V b = m[1] - usual, c = m[2] - usual;  // one more: a tie is won
  const V b_d = b > m[3], c_d = c > m[3], b_c = (b > m[2]) | ((m[1] == m[2]) & (m[2] == m[3]));
  keep[0] = majority(a_b, a_c, a_d);
  keep[1] = majority(~a_b, b_c, b_d);
  keep[2] = majority(~a_c, ~b_c, c_d);
  keep[3] = majority(~a_d, ~b_d, ~c_d);
}

// The second largest of every four, and the lanes where keeping what is at least as large would be wrong: the third is
// as large, or a value is NaN.
template <typename T>
AMCT_INLINE auto second_largest(const IVec<T>* m, IVec<T>& second) {
  const IVec<T> first = max(m[0], m[1]), other = max(m[2], m[3]);
  const IVec<T> p = min(first, other), q = max(min(m[0], m[1]), min(m[2], m[3]));
  second = max(p, q);
  using K = KeepMask<sizeof(T)>;
  constexpr auto infinity = static_cast<Lane<T>>(Traits<T>::kInfBits);
  return static_cast<typename K::Lanes>(K::equal(p, q) | K::greater(max(first, other), IVec<T>{} + infinity));
}

// The same with all NaN equal and larger than infinity.
template <typename T>
AMCT_INLINE void keep_2of4_with_nan(const IVec<T>* m, IVec<T>* keep) {
  const IVec<T> nan = IVec<T>{} + static_cast<Lane<T>>(Traits<T>::kInfBits + 1);
  const IVec<T> ordered[4] = {min(m[0], nan), min(m[1], nan), min(m[2], nan), min(m[3], nan)};
  keep_2of4_exact(ordered, keep);
}

// sink(keep masks of the four vectors): by the second largest where that decides all lanes, else by the exact rule.
template <typename T, typename Sink>
AMCT_INLINE void keep_2of4(const IVec<T>* raw, const Sink& sink) {
  using K = KeepMask<sizeof(T)>;
  const IVec<T> m[4] = {abs_bits<T>(raw[0]), abs_bits<T>(raw[1]), abs_bits<T>(raw[2]), abs_bits<T>(raw[3])};
  IVec<T> second, exact[4];
  if (!any_lane(second_largest<T>(m, second))) [[likely]] {
    const typename K::Keep keep[4] = {K::at_least(m[0], second), K::at_least(m[1], second), K::at_least(m[2], second),
                                      K::at_least(m[3], second)};
    sink(keep);
  } else {
    keep_2of4_with_nan<T>(m, exact);
    const typename K::Keep keep[4] = {K::from_lanes(exact[0]), K::from_lanes(exact[1]), K::from_lanes(exact[2]),
                                      K::from_lanes(exact[3])};
    sink(keep);
  }
}

}  // namespace
}  // namespace amct_ext::cpu
