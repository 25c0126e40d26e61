// Vec<A>: arithmetic a vector at a time, for loops where the order of a sum is fixed or where compilers miss a plain
// loop. One file per instruction set holds what differs (README.md lists the operations); what is common stands here.
#pragma once

#if defined(__SSE2__)
// Before the checks below: tests/native/avx512/immintrin.h, which tests put in its place, defines the AVX-512 macros.
#include <immintrin.h>
#endif

#include "simd/element.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd/vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd/vec_avx2.h"
#else
#include "simd/vec_generic.h"
#endif

namespace amct_ext::cpu {
namespace {

// Starts loading kBytes bytes at `from + distance` into the cache; the address may lie beyond the data.
template <int kBytes>
AMCT_INLINE void prefetch(const void* from, int64_t distance) {
  constexpr int kCacheLine = 64;
  const auto start = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(distance);
  for (int b = 0; b < kBytes; b += kCacheLine) __builtin_prefetch(reinterpret_cast<const void*>(start + b));
}

// As many values of any type as a vector has doubles.
template <typename T>
AMCT_INLINE Vec<double> load_double(const T* from) {
  if constexpr (sizeof(T) == 8) return load<Vec<double>>(from);
  HalfVec v;
  if constexpr (sizeof(T) == 4) {
    v = load<HalfVec>(from);
  } else {
    for (int l = 0; l < kLanes<double>; ++l) v[l] = widen(from[l]);
  }
  return to_double(v);
}

// +0 where the mask is not set. A choice `mask ? v : 0` would have compilers invert and repeat the comparison.
template <typename V>
AMCT_INLINE V zero_unless(auto mask, V v) {
  return reinterpret_cast<V>(reinterpret_cast<decltype(mask)>(v) & mask);
}

// a * b + c in one rounding. Only where kHasFma is it an instruction.
#if defined(__FP_FAST_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif
AMCT_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
AMCT_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <typename V>
AMCT_INLINE V fma(V a, V b, V c) {
  V result;
  for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) result[i] = fma(a[i], b[i], c[i]);  // becomes one instruction
  return result;
}

// a * b + zero, which rounds to the same in one step or in two unless a * b underflows.
template <typename V>
AMCT_INLINE V mul_add_zero(V a, V b, V zero) {
  if constexpr (kHasFma) return fma(a, b, zero);
  return a * b + zero;
}

}  // namespace
}  // namespace amct_ext::cpu
