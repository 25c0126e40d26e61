// What a 2:4 mask keeps of four registers that hold the members of as many groups as a register has lanes. The rule is
// stated in amct_ext/ops/masks.py; magnitudes are compared as bit patterns, which orders NaN last.
#pragma once

#include "cpu/isa/register.h"

namespace amct_ext::cpu {
namespace {

// What is kept of a register, from comparisons: a mask register where there are such, else all ones or zero in a lane.
// `put` writes it as bytes.
#if defined(AMCT_AVX512)
AMCT_INLINE __m512i plain(auto v) { return as<__m512i>(v); }
AMCT_INLINE bool somewhere(uint32_t lanes) { return lanes != 0; }

template <int kBytes>
struct Choice;
template <>
struct Choice<4> {
  using Lanes = __mmask16;
  static AMCT_INLINE __mmask16 at_least(auto a, auto b) { return _mm512_cmpge_epi32_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask16 equal(auto a, auto b) { return _mm512_cmpeq_epi32_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask16 ones(auto v) { return _mm512_movepi32_mask(plain(v)); }
  static AMCT_INLINE void put(__mmask16 keep, uint8_t* mask) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
  }
  template <typename V>
  static AMCT_INLINE V load(V other, Lanes lanes, const void* from) {
    return as<V>(_mm512_mask_loadu_epi32(plain(other), lanes, from));
  }
  static AMCT_INLINE void put(Lanes lanes, Lanes keep, uint8_t* mask) {
    _mm_mask_storeu_epi8(mask, lanes, _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
  }
};
template <>
struct Choice<8> {
  using Lanes = __mmask8;
  static AMCT_INLINE __mmask8 at_least(auto a, auto b) { return _mm512_cmpge_epi64_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask8 equal(auto a, auto b) { return _mm512_cmpeq_epi64_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask8 ones(auto v) { return _mm512_movepi64_mask(plain(v)); }
  static AMCT_INLINE void put(__mmask8 keep, uint8_t* mask) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(mask), _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
  }
  template <typename V>
  static AMCT_INLINE V load(V other, Lanes lanes, const void* from) {
    return as<V>(_mm512_mask_loadu_epi64(plain(other), lanes, from));
  }
  static AMCT_INLINE void put(Lanes lanes, Lanes keep, uint8_t* mask) {
    _mm_mask_storeu_epi8(mask, lanes, _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
  }
};
template <>
struct Choice<2> {
  using Lanes = __mmask32;
  static AMCT_INLINE __mmask32 at_least(auto a, auto b) { return _mm512_cmpge_epi16_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask32 equal(auto a, auto b) { return _mm512_cmpeq_epi16_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask32 ones(auto v) { return _mm512_movepi16_mask(plain(v)); }
  static AMCT_INLINE void put(__mmask32 keep, uint8_t* mask) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask), _mm256_maskz_mov_epi8(keep, _mm256_set1_epi8(1)));
  }
  template <typename V>
  static AMCT_INLINE V load(V other, Lanes lanes, const void* from) {
    return as<V>(_mm512_mask_loadu_epi16(plain(other), lanes, from));
  }
  static AMCT_INLINE void put(Lanes lanes, Lanes keep, uint8_t* mask) {
    _mm256_mask_storeu_epi8(mask, lanes, _mm256_maskz_mov_epi8(keep, _mm256_set1_epi8(1)));
  }
};
#else
template <typename V>
AMCT_INLINE bool somewhere(V lanes) {
  return any(lanes);
}

// Lanes that are all ones or zero as bytes 1 or 0. Compilers make poor code of the conversion.
template <int kBytes, typename V>
AMCT_INLINE void put_bytes(V keep, uint8_t* mask) {
  constexpr int kLanes = kRegister / kBytes;
#if defined(__SSE2__)
  __m128i half[2];
  __builtin_memcpy(&half[0], &keep, 16);
  __builtin_memcpy(&half[1], reinterpret_cast<const char*>(&keep) + kRegister - 16, 16);
  __m128i v = kBytes == 2 ? _mm_packs_epi16(half[0], half[1]) : _mm_packs_epi32(half[0], half[1]);
  for (int size = kBytes; size > 2; size /= 2) v = _mm_packs_epi16(v, v);
  v = _mm_and_si128(v, _mm_set1_epi8(1));
  __builtin_memcpy(mask, &v, kLanes);
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector(keep, Bytes) & 1;
  __builtin_memcpy(mask, &bytes, kLanes);
#endif
}

template <int kBytes>
struct Choice {
  template <typename V>
  static AMCT_INLINE V at_least(V a, V b) {
    return a >= b;
  }
  template <typename V>
  static AMCT_INLINE V equal(V a, V b) {
    return a == b;
  }
  template <typename V>
  static AMCT_INLINE V ones(V v) {
    return v;
  }
  template <typename V>
  static AMCT_INLINE void put(V keep, uint8_t* mask) {
    put_bytes<kBytes>(keep, mask);
  }
};
#endif

template <typename V>
AMCT_INLINE V two_of(V a, V b, V c) {
  return (a & b) | (c & (a | b));
}

// What is kept of groups whose members lie in four vectors. A value is kept that goes before two others, where the
// larger goes before the smaller and of equals the first goes first; but where the first of the four is the smallest
// alone, of equals the last goes first, and of three equals the middle one last.
template <typename V>
AMCT_INLINE void kept_of_four(const V* m, V* keep) {
  const V a_b = m[0] >= m[1], a_c = m[0] >= m[2], a_d = m[0] >= m[3];
  const V usual = a_b | a_c | a_d;             // -1 where the first is not the smallest alone
  const V b = m[1] - usual, c = m[2] - usual;  // one more: a tie is won
  const V b_d = b > m[3], c_d = c > m[3], b_c = (b > m[2]) | ((m[1] == m[2]) & (m[2] == m[3]));
  keep[0] = two_of(a_b, a_c, a_d);
  keep[1] = two_of(~a_b, b_c, b_d);
  keep[2] = two_of(~a_c, ~b_c, c_d);
  keep[3] = two_of(~a_d, ~b_d, ~c_d);
}

// The second largest of every four and whether the choice is clear: it is not where the third is as large, or where a
// value is NaN.
template <typename T>
AMCT_INLINE bool second_largest(const V<T>* m, V<T>& second) {
  const V<T> first = larger(m[0], m[1]), other = larger(m[2], m[3]);
  const V<T> p = smaller(first, other), q = larger(smaller(m[0], m[1]), smaller(m[2], m[3]));
  second = larger(p, q);
  using C = Choice<sizeof(T)>;
  constexpr auto nan = static_cast<Lane<T>>(Traits<T>::kInfinity + 1);
  return !somewhere(C::equal(p, q) | C::at_least(larger(first, other), V<T>{} + nan));
}

// All NaN are equal and larger than infinity.
template <typename T>
AMCT_INLINE void chosen_exactly(const V<T>* m, V<T>* keep) {
  const V<T> nan = V<T>{} + static_cast<Lane<T>>(Traits<T>::kInfinity + 1);
  const V<T> ordered[4] = {smaller(m[0], nan), smaller(m[1], nan), smaller(m[2], nan), smaller(m[3], nan)};
  kept_of_four(ordered, keep);
}

// put(member, what is kept of it) for each of the four.
template <typename T, typename Put>
AMCT_INLINE void choose(const V<T>* raw, const Put& put) {
  using C = Choice<sizeof(T)>;
  const V<T> m[4] = {magnitudes<T>(raw[0]), magnitudes<T>(raw[1]), magnitudes<T>(raw[2]), magnitudes<T>(raw[3])};
  V<T> second, keep[4];
  if (second_largest<T>(m, second)) [[likely]] {
    for (int r = 0; r < 4; ++r) put(r, C::at_least(m[r], second));
  } else {
    chosen_exactly<T>(m, keep);
    for (int r = 0; r < 4; ++r) put(r, C::ones(keep[r]));
  }
}

}  // namespace
}  // namespace amct_ext::cpu
