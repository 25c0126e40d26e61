// Masks of vectors written as bytes, the form a bool tensor has. Compilers make poor code of the conversion.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

// A byte of 0 for every lane that is all ones (the value is dropped), of 1 for every lane that is zero.
#if defined(__SSE2__)
AMCT_INLINE __m128i part_of(const auto& v, int i) {
  __m128i part;
  __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + 16 * i, 16);
  return part;
}
template <int kBytes>
AMCT_INLINE void store_mask_bytes(uint8_t* to, const auto& dropped) {
  const __m128i first = part_of(dropped, 0), last = part_of(dropped, kVecBytes / 16 - 1);
  __m128i v = kBytes == 2 ? _mm_packs_epi16(first, last) : _mm_packs_epi32(first, last);
  for (int size = kBytes; size > 2; size /= 2) v = _mm_packs_epi16(v, v);
  v = _mm_add_epi8(v, _mm_set1_epi8(1));
  __builtin_memcpy(to, &v, kVecBytes / kBytes);
}
#else
template <int kBytes>
AMCT_INLINE void store_mask_bytes(uint8_t* to, const auto& dropped) {
  typedef uint8_t Bytes __attribute__((vector_size(kVecBytes / kBytes)));
  const Bytes bytes = __builtin_convertvector(dropped, Bytes) + 1;
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}
#endif

// Four vectors, their bytes `stride` apart.
template <int kBytes>
AMCT_INLINE void store4_mask_bytes(uint8_t* to, const auto* dropped, int64_t stride) {
#if defined(__AVX2__)
  if constexpr (kBytes == 4) {
    const auto pack = [&](int r) {
      return _mm256_packs_epi32(bit_cast<__m256i>(dropped[r]), bit_cast<__m256i>(dropped[r + 1]));
    };
    const __m256i mixed = _mm256_packs_epi16(pack(0), pack(2));  // the first halves of the vectors, then the second
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i rows = _mm256_add_epi8(_mm256_permutevar8x32_epi32(mixed, order), _mm256_set1_epi8(1));
    if (stride == kLanes<float>) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rows);
    const auto* words = reinterpret_cast<const int64_t*>(&rows);
    for (int r = 0; r < 4; ++r) __builtin_memcpy(to + r * stride, words + r, sizeof(*words));
    return;
  }
#endif
  for (int r = 0; r < 4; ++r) store_mask_bytes<kBytes>(to + r * stride, dropped[r]);
}

}  // namespace
}  // namespace amct_ext::cpu
