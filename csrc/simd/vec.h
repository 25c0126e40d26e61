// Arithmetic a register at a time. Explicit vectors where the order of a sum has to be fixed, or where compilers miss a
// plain loop.
#pragma once

#include "simd/vec_types.h"

namespace amct_ext::cpu {
namespace {

// Intrinsics of 512 bits are taken in their masked form, all lanes kept: it is the same instruction, but gcc 12 takes
// the plain forms for reads of uninitialised memory.

// Values of an arithmetic type, and what comparing them gives: all bits where true.
template <typename A>
using Row = typename Register<sizeof(A)>::Floating;
template <typename A>
using Mask = V<A>;
template <typename A>
constexpr int kRow = kWidth<A>;

template <typename R>
AMCT_INLINE R load_row(const void* from) {
  R row;
  __builtin_memcpy(&row, from, sizeof(R));
  return row;
}
template <typename R>
AMCT_INLINE void store_row(void* to, R row) {
  __builtin_memcpy(to, &row, sizeof(R));
}

// As many values of any type as float64.
template <typename T>
AMCT_INLINE Row<double> doubles(const T* from) {
  if constexpr (sizeof(T) == 8) return load_row<Row<double>>(from);
  using Singles = float __attribute__((vector_size(kRegister / 2)));
  Singles row;
  if constexpr (sizeof(T) == 4) {
    row = load_row<Singles>(from);
  } else {
    for (int l = 0; l < kRow<double>; ++l) row[l] = widen(from[l]);
  }
  // Compilers make two halves of the general form.
#if defined(AMCT_AVX512)
  return _mm512_maskz_cvtps_pd(-1, row);
#elif defined(AMCT_AVX2)
  return _mm256_cvtps_pd(row);
#else
  return __builtin_convertvector(row, Row<double>);
#endif
}

template <typename A>
AMCT_INLINE Row<A> filled(A v) {
  return v - Row<A>{};
}

template <typename A>
AMCT_INLINE Mask<A> magnitude_bits_of(Row<A> v) {
  return magnitudes<A>(reinterpret_cast<Mask<A>>(v));
}

// +0 elsewhere. Compilers invert the comparison behind a choice of zero, and make it again.
template <typename R>
AMCT_INLINE R where(auto mask, R v) {
  return reinterpret_cast<R>(reinterpret_cast<decltype(mask)>(v) & mask);
}

// NaN stays NaN. Compilers miss the two instructions where v was made as a bit pattern.
template <typename R>
AMCT_INLINE R clamped(R v, R low, R high) {
  [[maybe_unused]] constexpr bool single = sizeof(v[0]) == 4;
#if defined(AMCT_AVX512)
  if constexpr (single) return _mm512_maskz_min_ps(-1, high, _mm512_maskz_max_ps(-1, low, v));
  if constexpr (!single) return _mm512_maskz_min_pd(-1, high, _mm512_maskz_max_pd(-1, low, v));
#elif defined(AMCT_AVX2)
  if constexpr (single) return _mm256_min_ps(high, _mm256_max_ps(low, v));
  if constexpr (!single) return _mm256_min_pd(high, _mm256_max_pd(low, v));
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}

AMCT_INLINE Row<float> rounded(Row<float> v) {
#if defined(AMCT_AVX512)
  return _mm512_maskz_roundscale_ps(-1, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(AMCT_AVX2)
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Mask<float> size = magnitude_bits_of<float>(v), sign = reinterpret_cast<Mask<float>>(v) ^ size;
  const Row<float> magic = filled(8388608.0f), sum = reinterpret_cast<Row<float>>(size) + magic - magic;
  const Row<float> whole = reinterpret_cast<Row<float>>(reinterpret_cast<Mask<float>>(sum) | sign);
  return reinterpret_cast<Row<float>>(size) < magic ? whole : v;
#endif
}

AMCT_INLINE Row<double> rounded(Row<double> v) {
#if defined(AMCT_AVX512)
  return _mm512_maskz_roundscale_pd(-1, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(AMCT_AVX2)
  return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Mask<double> size = magnitude_bits_of<double>(v), sign = reinterpret_cast<Mask<double>>(v) ^ size;
  const Row<double> magic = filled(4503599627370496.0), sum = reinterpret_cast<Row<double>>(size) + magic - magic;
  const Row<double> whole = reinterpret_cast<Row<double>>(reinterpret_cast<Mask<double>>(sum) | sign);
  return reinterpret_cast<Row<double>>(size) < magic ? whole : v;
#endif
}

// a * b + c in one rounding, where the processor has that.
#if defined(__FP_FAST_FMA)
AMCT_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
AMCT_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <typename R>
AMCT_INLINE R fused(R a, R b, R c) {
  R result;
  for (size_t i = 0; i < sizeof(R) / sizeof(a[0]); ++i) result[i] = fused(a[i], b[i], c[i]);  // one instruction
  return result;
}
#endif

// a * b + zero: the same result in one rounding or in two, unless a * b underflows.
template <typename R>
AMCT_INLINE R product(R a, R b, R zero) {
#if defined(__FP_FAST_FMA)
  return fused(a, b, zero);
#else
  return a * b + zero;
#endif
}

// Whether a lane is `limit` or more, all being positive.
template <typename T>
AMCT_INLINE bool reach(V<T> lanes, T limit) {
#if defined(AMCT_AVX512)
  const auto v = as<__m512i>(lanes);
  if constexpr (sizeof(T) == 8) return _mm512_cmpge_epi64_mask(v, _mm512_set1_epi64(as<int64_t>(limit))) != 0;
  if constexpr (sizeof(T) == 4) return _mm512_cmpge_epi32_mask(v, _mm512_set1_epi32(as<int32_t>(limit))) != 0;
  if constexpr (sizeof(T) == 2) return _mm512_cmpge_epi16_mask(v, _mm512_set1_epi16(as<int16_t>(limit))) != 0;
#else
  return any(lanes >= as<Lane<T>>(limit));
#endif
}

}  // namespace
}  // namespace amct_ext::cpu
