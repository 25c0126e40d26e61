// Vectors of 32 bytes: AVX2 with FMA and F16C (x86-64-v3).
#pragma once

#include <immintrin.h>

#define AMCT_VEC_BYTES 32
#include "simd/vec_types.h"

namespace amct_ext::cpu {
namespace {

constexpr bool kHasIntegerMax = true;

template <typename T>
AMCT_INLINE IVec<T> load_masked(const T* from, const uint8_t* mask) {
  if constexpr (sizeof(T) == 2) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
    return load_bits(from) & -bit_cast<IVec<T>>(_mm256_cvtepu8_epi16(bytes));
  } else if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
    return load_bits(from) & -bit_cast<IVec<T>>(_mm256_cvtepu8_epi32(bytes));
  } else {
    int bytes;
    __builtin_memcpy(&bytes, mask, sizeof(bytes));
    return load_bits(from) & -bit_cast<IVec<T>>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)));
  }
}

template <typename V>
AMCT_INLINE bool any(V v) {
  return !_mm256_testz_si256(bit_cast<__m256i>(v), bit_cast<__m256i>(v));
}

template <typename T>
AMCT_INLINE bool any_ge(IVec<T> v, T limit) {
  return any(v >= bit_cast<Lane<T>>(limit));
}

// Compilers miss these two instructions where v was made as a bit pattern.
AMCT_INLINE Vec<float> clamp(Vec<float> v, Vec<float> low, Vec<float> high) {
  return _mm256_min_ps(high, _mm256_max_ps(low, v));
}
AMCT_INLINE Vec<double> clamp(Vec<double> v, Vec<double> low, Vec<double> high) {
  return _mm256_min_pd(high, _mm256_max_pd(low, v));
}

AMCT_INLINE Vec<float> round_even(Vec<float> v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AMCT_INLINE Vec<double> round_even(Vec<double> v) {
  return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Compilers make two halves of the general conversion.
AMCT_INLINE Vec<double> to_double(HalfVec v) { return _mm256_cvtps_pd(v); }

AMCT_INLINE Vec<float> widen_float16(HalfBits v) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v)); }
AMCT_INLINE HalfBits narrow_float16(Vec<float> v) {
  return reinterpret_cast<HalfBits>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// Rounds by adding half of the last bit that stays, less one where that bit is even.
AMCT_INLINE UVec<BFloat16> narrow_bfloat16(Vec<float> first, Vec<float> second) {
  const auto even = reinterpret_cast<UVec32>(first), odd = reinterpret_cast<UVec32>(second);
  const UVec32 low = (even + 0x7fffu + ((even >> 16) & 1u)) >> 16;
  const UVec32 high = odd + 0x7fffu + ((odd >> 16) & 1u);
  return bit_cast<UVec<BFloat16>>(_mm256_blend_epi16(bit_cast<__m256i>(low), bit_cast<__m256i>(high), 0xaa));
}

}  // namespace
}  // namespace amct_ext::cpu
