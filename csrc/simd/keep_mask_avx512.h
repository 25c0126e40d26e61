// KeepMask in a mask register: a bit for each lane that is kept.
#pragma once

#include "simd/vec_avx512.h"

namespace amct_ext::cpu {
namespace {

AMCT_INLINE __m512i m512i(auto v) { return bit_cast<__m512i>(v); }
AMCT_INLINE bool any_lane(uint32_t lanes) { return lanes != 0; }

// What all mask registers have: `Lanes` has a bit for each lane, a byte of memory is 0 or 1 for each of them.
template <typename LaneBits>
struct MaskRegister {
  using Lanes = LaneBits;
  using Keep = LaneBits;
  static constexpr bool kMaskedMemory = true;
  static AMCT_INLINE void store(uint8_t* to, Keep keep) {
    if constexpr (sizeof(Keep) == 4) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_mov_epi8(keep, _mm256_set1_epi8(1)));
    } else if constexpr (sizeof(Keep) == 2) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
    } else {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
    }
  }
  static AMCT_INLINE void store4(uint8_t* to, const Keep* keep, int64_t stride) {
    for (int r = 0; r < 4; ++r) store(to + r * stride, keep[r]);
  }
  static AMCT_INLINE void store_some(uint8_t* to, Lanes lanes, Keep keep) {
    if constexpr (sizeof(Keep) == 4) {
      _mm256_mask_storeu_epi8(to, lanes, _mm256_maskz_mov_epi8(keep, _mm256_set1_epi8(1)));
    } else {
      _mm_mask_storeu_epi8(to, lanes, _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
    }
  }
};

template <int kBytes>
struct KeepMask;
template <>
struct KeepMask<2> : MaskRegister<__mmask32> {
  static AMCT_INLINE Lanes equal(auto a, auto b) { return _mm512_cmpeq_epi16_mask(m512i(a), m512i(b)); }
  static AMCT_INLINE Lanes greater(auto a, auto b) { return _mm512_cmpgt_epi16_mask(m512i(a), m512i(b)); }
  static AMCT_INLINE Keep at_least(auto m, auto limit) { return _mm512_cmpge_epi16_mask(m512i(m), m512i(limit)); }
  static AMCT_INLINE Keep from_lanes(auto v) { return _mm512_movepi16_mask(m512i(v)); }
  template <typename V>
  static AMCT_INLINE V apply(V v, Keep keep) {
    return bit_cast<V>(_mm512_maskz_mov_epi16(keep, m512i(v)));
  }
  template <typename V>
  static AMCT_INLINE V load_some(V other, Lanes lanes, const void* from) {
    return bit_cast<V>(_mm512_mask_loadu_epi16(m512i(other), lanes, from));
  }
};
template <>
struct KeepMask<4> : MaskRegister<__mmask16> {
  static AMCT_INLINE Lanes equal(auto a, auto b) { return _mm512_cmpeq_epi32_mask(m512i(a), m512i(b)); }
  static AMCT_INLINE Lanes greater(auto a, auto b) { return _mm512_cmpgt_epi32_mask(m512i(a), m512i(b)); }
  static AMCT_INLINE Keep at_least(auto m, auto limit) { return _mm512_cmpge_epi32_mask(m512i(m), m512i(limit)); }
  static AMCT_INLINE Keep from_lanes(auto v) { return _mm512_movepi32_mask(m512i(v)); }
  template <typename V>
  static AMCT_INLINE V apply(V v, Keep keep) {
    return bit_cast<V>(_mm512_maskz_mov_epi32(keep, m512i(v)));
  }
  template <typename V>
  static AMCT_INLINE V load_some(V other, Lanes lanes, const void* from) {
    return bit_cast<V>(_mm512_mask_loadu_epi32(m512i(other), lanes, from));
  }
};
template <>
struct KeepMask<8> : MaskRegister<__mmask8> {
  static AMCT_INLINE Lanes equal(auto a, auto b) { return _mm512_cmpeq_epi64_mask(m512i(a), m512i(b)); }
  static AMCT_INLINE Lanes greater(auto a, auto b) { return _mm512_cmpgt_epi64_mask(m512i(a), m512i(b)); }
  static AMCT_INLINE Keep at_least(auto m, auto limit) { return _mm512_cmpge_epi64_mask(m512i(m), m512i(limit)); }
  static AMCT_INLINE Keep from_lanes(auto v) { return _mm512_movepi64_mask(m512i(v)); }
  template <typename V>
  static AMCT_INLINE V apply(V v, Keep keep) {
    return bit_cast<V>(_mm512_maskz_mov_epi64(keep, m512i(v)));
  }
  template <typename V>
  static AMCT_INLINE V load_some(V other, Lanes lanes, const void* from) {
    return bit_cast<V>(_mm512_mask_loadu_epi64(m512i(other), lanes, from));
  }
};

}  // namespace
}  // namespace amct_ext::cpu
