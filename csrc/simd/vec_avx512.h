// Vectors of 64 bytes: AVX-512 with BW, DQ and VL (x86-64-v4), and the bfloat16 conversion where there is one.
//
// Intrinsics of 512 bits are taken in their masked form with all lanes set: it is the same instruction, but gcc 12
// takes the plain forms for reads of uninitialised memory.
#pragma once

#include <immintrin.h>

#define AMCT_VEC_BYTES 64
#include "simd/vec_types.h"

namespace amct_ext::cpu {
namespace {

constexpr bool kHasIntegerMax = true;

template <typename T>
AMCT_INLINE IVec<T> load_masked(const T* from, const uint8_t* mask) {
  if constexpr (sizeof(T) == 2) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
    return bit_cast<IVec<T>>(_mm512_maskz_loadu_epi16(_mm256_test_epi8_mask(bytes, bytes), from));
  } else if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
    return bit_cast<IVec<T>>(_mm512_maskz_loadu_epi32(_mm_test_epi8_mask(bytes, bytes), from));
  } else {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
    return bit_cast<IVec<T>>(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes)), from));
  }
}

template <typename V>
AMCT_INLINE bool any(V v) {
  return _mm512_test_epi64_mask(bit_cast<__m512i>(v), bit_cast<__m512i>(v)) != 0;
}

template <typename T>
AMCT_INLINE bool any_ge(IVec<T> lanes, T limit) {
  const auto v = bit_cast<__m512i>(lanes);
  if constexpr (sizeof(T) == 8) return _mm512_cmpge_epi64_mask(v, _mm512_set1_epi64(bit_cast<int64_t>(limit))) != 0;
  if constexpr (sizeof(T) == 4) return _mm512_cmpge_epi32_mask(v, _mm512_set1_epi32(bit_cast<int32_t>(limit))) != 0;
  if constexpr (sizeof(T) == 2) return _mm512_cmpge_epi16_mask(v, _mm512_set1_epi16(bit_cast<int16_t>(limit))) != 0;
}

// Compilers miss these two instructions where v was made as a bit pattern.
AMCT_INLINE Vec<float> clamp(Vec<float> v, Vec<float> low, Vec<float> high) {
  return _mm512_maskz_min_ps(-1, high, _mm512_maskz_max_ps(-1, low, v));
}
AMCT_INLINE Vec<double> clamp(Vec<double> v, Vec<double> low, Vec<double> high) {
  return _mm512_maskz_min_pd(-1, high, _mm512_maskz_max_pd(-1, low, v));
}

AMCT_INLINE Vec<float> round_even(Vec<float> v) {
  return _mm512_maskz_roundscale_ps(-1, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AMCT_INLINE Vec<double> round_even(Vec<double> v) {
  return _mm512_maskz_roundscale_pd(-1, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Compilers make two halves of the general conversion.
AMCT_INLINE Vec<double> to_double(HalfVec v) { return _mm512_maskz_cvtps_pd(-1, v); }

AMCT_INLINE Vec<float> widen_float16(HalfBits v) { return _mm512_maskz_cvtph_ps(-1, reinterpret_cast<__m256i>(v)); }
AMCT_INLINE HalfBits narrow_float16(Vec<float> v) {
  return reinterpret_cast<HalfBits>(_mm512_maskz_cvtps_ph(-1, v, _MM_FROUND_TO_NEAREST_INT));
}

#if defined(__AVX512BF16__)
// One instruction rounds both vectors, one behind the other.
AMCT_INLINE UVec<BFloat16> narrow_bfloat16(Vec<float> first, Vec<float> second) {
  constexpr UVec<BFloat16> interleave = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  return bit_cast<UVec<BFloat16>>(_mm512_maskz_permutexvar_epi16(-1, reinterpret_cast<__m512i>(interleave), both));
}
#else
// Rounds by adding half of the last bit that stays, less one where that bit is even.
AMCT_INLINE UVec<BFloat16> narrow_bfloat16(Vec<float> first, Vec<float> second) {
  const auto even = reinterpret_cast<UVec32>(first), odd = reinterpret_cast<UVec32>(second);
  const UVec32 low = (even + 0x7fffu + ((even >> 16) & 1u)) >> 16;
  const UVec32 high = odd + 0x7fffu + ((odd >> 16) & 1u);
  return reinterpret_cast<UVec<BFloat16>>(low | (high & 0xffff0000u));
}
#endif

}  // namespace
}  // namespace amct_ext::cpu
