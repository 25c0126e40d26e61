// What a 2:4 mask keeps of four registers that hold the members of as many groups as a register has lanes. The rule is
// stated in amct_ext/ops/sparsity_mask.py; magnitudes are compared as bit patterns, which orders NaN last.
#pragma once

#include "simd/vec_types.h"

namespace amct_ext::cpu {
namespace {

// What is kept of a register, from comparisons: in a mask register where there are such. `from`: what is not below the
// second largest; `where`: lanes of all ones; `put_four` writes four as bytes.
#if defined(AMCT_AVX512)
AMCT_INLINE __m512i plain(auto v) { return as<__m512i>(v); }
AMCT_INLINE bool somewhere(uint32_t lanes) { return lanes != 0; }

template <int kBytes>
struct Choice;
template <>
struct Choice<4> {
  using Lanes = __mmask16;
  using Keep = __mmask16;
  static AMCT_INLINE Lanes equal(auto a, auto b) { return _mm512_cmpeq_epi32_mask(plain(a), plain(b)); }
  static AMCT_INLINE Lanes above(auto a, auto b) { return _mm512_cmpgt_epi32_mask(plain(a), plain(b)); }
  static AMCT_INLINE Keep from(auto m, auto second) { return _mm512_cmpge_epi32_mask(plain(m), plain(second)); }
  static AMCT_INLINE Keep where(auto v) { return _mm512_movepi32_mask(plain(v)); }
  template <typename V>
  static AMCT_INLINE V kept(V v, Keep keep) {
    return as<V>(_mm512_maskz_mov_epi32(keep, plain(v)));
  }
  static AMCT_INLINE void put(Keep keep, uint8_t* mask) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
  }
  static AMCT_INLINE void put_four(const Keep* keep, uint8_t* mask, int64_t apart) {
    for (int r = 0; r < 4; ++r) put(keep[r], mask + r * apart);
  }
  template <typename V>
  static AMCT_INLINE V load(V other, Lanes lanes, const void* from) {
    return as<V>(_mm512_mask_loadu_epi32(plain(other), lanes, from));
  }
  static AMCT_INLINE void put(Lanes lanes, Keep keep, uint8_t* mask) {
    _mm_mask_storeu_epi8(mask, lanes, _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
  }
};
template <>
struct Choice<8> {
  using Lanes = __mmask8;
  using Keep = __mmask8;
  static AMCT_INLINE Lanes equal(auto a, auto b) { return _mm512_cmpeq_epi64_mask(plain(a), plain(b)); }
  static AMCT_INLINE Lanes above(auto a, auto b) { return _mm512_cmpgt_epi64_mask(plain(a), plain(b)); }
  static AMCT_INLINE Keep from(auto m, auto second) { return _mm512_cmpge_epi64_mask(plain(m), plain(second)); }
  static AMCT_INLINE Keep where(auto v) { return _mm512_movepi64_mask(plain(v)); }
  template <typename V>
  static AMCT_INLINE V kept(V v, Keep keep) {
    return as<V>(_mm512_maskz_mov_epi64(keep, plain(v)));
  }
  static AMCT_INLINE void put(Keep keep, uint8_t* mask) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(mask), _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
  }
  static AMCT_INLINE void put_four(const Keep* keep, uint8_t* mask, int64_t apart) {
    for (int r = 0; r < 4; ++r) put(keep[r], mask + r * apart);
  }
  template <typename V>
  static AMCT_INLINE V load(V other, Lanes lanes, const void* from) {
    return as<V>(_mm512_mask_loadu_epi64(plain(other), lanes, from));
  }
  static AMCT_INLINE void put(Lanes lanes, Keep keep, uint8_t* mask) {
    _mm_mask_storeu_epi8(mask, lanes, _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
  }
};
template <>
struct Choice<2> {
  using Lanes = __mmask32;
  using Keep = __mmask32;
  static AMCT_INLINE Lanes equal(auto a, auto b) { return _mm512_cmpeq_epi16_mask(plain(a), plain(b)); }
  static AMCT_INLINE Lanes above(auto a, auto b) { return _mm512_cmpgt_epi16_mask(plain(a), plain(b)); }
  static AMCT_INLINE Keep from(auto m, auto second) { return _mm512_cmpge_epi16_mask(plain(m), plain(second)); }
  static AMCT_INLINE Keep where(auto v) { return _mm512_movepi16_mask(plain(v)); }
  template <typename V>
  static AMCT_INLINE V kept(V v, Keep keep) {
    return as<V>(_mm512_maskz_mov_epi16(keep, plain(v)));
  }
  static AMCT_INLINE void put(Keep keep, uint8_t* mask) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask), _mm256_maskz_mov_epi8(keep, _mm256_set1_epi8(1)));
  }
  static AMCT_INLINE void put_four(const Keep* keep, uint8_t* mask, int64_t apart) {
    for (int r = 0; r < 4; ++r) put(keep[r], mask + r * apart);
  }
  template <typename V>
  static AMCT_INLINE V load(V other, Lanes lanes, const void* from) {
    return as<V>(_mm512_mask_loadu_epi16(plain(other), lanes, from));
  }
  static AMCT_INLINE void put(Lanes lanes, Keep keep, uint8_t* mask) {
    _mm256_mask_storeu_epi8(mask, lanes, _mm256_maskz_mov_epi8(keep, _mm256_set1_epi8(1)));
  }
};
#else
template <typename V>
AMCT_INLINE bool somewhere(V lanes) {
  return any(lanes);
}

// Four registers of lanes that are all ones where a value goes, as bytes of 0 there and 1 elsewhere: rows of the mask
// `apart`. Compilers make poor code of the conversion.
#if defined(__SSE2__)
AMCT_INLINE __m128i half(const auto& v, int at) {
  __m128i part;
  __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + 16 * at, 16);
  return part;
}
template <int kBytes>
AMCT_INLINE void put_bytes(const auto& gone, uint8_t* mask) {
  const __m128i first = half(gone, 0), last = half(gone, kRegister / 16 - 1);
  __m128i v = kBytes == 2 ? _mm_packs_epi16(first, last) : _mm_packs_epi32(first, last);
  for (int size = kBytes; size > 2; size /= 2) v = _mm_packs_epi16(v, v);
  v = _mm_add_epi8(v, _mm_set1_epi8(1));
  __builtin_memcpy(mask, &v, kRegister / kBytes);
}
#else
template <int kBytes>
AMCT_INLINE void put_bytes(const auto& gone, uint8_t* mask) {
  typedef uint8_t Bytes __attribute__((vector_size(kRegister / kBytes)));
  const Bytes bytes = __builtin_convertvector(gone, Bytes) + 1;
  __builtin_memcpy(mask, &bytes, sizeof(bytes));
}
#endif

template <int kBytes>
AMCT_INLINE void put_four_bytes(const auto* gone, uint8_t* mask, int64_t apart) {
#if defined(AMCT_AVX2)
  if constexpr (kBytes == 4) {
    const auto two = [&](int r) { return _mm256_packs_epi32(as<__m256i>(gone[r]), as<__m256i>(gone[r + 1])); };
    const __m256i mixed = _mm256_packs_epi16(two(0), two(2));  // the first halves of the rows, then the second
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i rows = _mm256_add_epi8(_mm256_permutevar8x32_epi32(mixed, order), _mm256_set1_epi8(1));
    if (apart == kWidth<float>) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask), rows);
    const auto* words = reinterpret_cast<const int64_t*>(&rows);
    for (int r = 0; r < 4; ++r) __builtin_memcpy(mask + r * apart, words + r, sizeof(*words));
    return;
  }
#endif
  for (int r = 0; r < 4; ++r) put_bytes<kBytes>(gone[r], mask + r * apart);
}

// All ones in the lanes of what is not kept.
template <int kBytes>
struct Choice {
  using Lanes = typename Register<kBytes>::Signed;
  using Keep = Lanes;
  static AMCT_INLINE Keep equal(Keep a, Keep b) { return a == b; }
  static AMCT_INLINE Keep above(Keep a, Keep b) { return a > b; }
  static AMCT_INLINE Keep from(Keep m, Keep second) { return second > m; }
  static AMCT_INLINE Keep where(Keep v) { return ~v; }
  static AMCT_INLINE Keep kept(Keep v, Keep gone) { return v & ~gone; }
  static AMCT_INLINE void put(Keep gone, uint8_t* mask) { put_bytes<kBytes>(gone, mask); }
  static AMCT_INLINE void put_four(const Keep* gone, uint8_t* mask, int64_t apart) {
    put_four_bytes<kBytes>(gone, mask, apart);
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

// The second largest of every four, and the lanes where that leaves the choice open: the third is as large, or a value
// is NaN.
template <typename T>
AMCT_INLINE auto second_largest(const V<T>* m, V<T>& second) {
  const V<T> first = larger(m[0], m[1]), other = larger(m[2], m[3]);
  const V<T> p = smaller(first, other), q = larger(smaller(m[0], m[1]), smaller(m[2], m[3]));
  second = larger(p, q);
  using C = Choice<sizeof(T)>;
  constexpr auto infinity = static_cast<Lane<T>>(Traits<T>::kInfinity);
  return static_cast<typename C::Lanes>(C::equal(p, q) | C::above(larger(first, other), V<T>{} + infinity));
}

// All NaN are equal and larger than infinity.
template <typename T>
AMCT_INLINE void chosen_exactly(const V<T>* m, V<T>* keep) {
  const V<T> nan = V<T>{} + static_cast<Lane<T>>(Traits<T>::kInfinity + 1);
  const V<T> ordered[4] = {smaller(m[0], nan), smaller(m[1], nan), smaller(m[2], nan), smaller(m[3], nan)};
  kept_of_four(ordered, keep);
}

// put(what is kept of each of the four).
template <typename T, typename Put>
AMCT_INLINE void choose(const V<T>* raw, const Put& put) {
  using C = Choice<sizeof(T)>;
  const V<T> m[4] = {magnitudes<T>(raw[0]), magnitudes<T>(raw[1]), magnitudes<T>(raw[2]), magnitudes<T>(raw[3])};
  V<T> second, exact[4];
  if (!somewhere(second_largest<T>(m, second))) [[likely]] {
    const typename C::Keep keep[4] = {C::from(m[0], second), C::from(m[1], second), C::from(m[2], second),
                                      C::from(m[3], second)};
    put(keep);
  } else {
    chosen_exactly<T>(m, exact);
    const typename C::Keep keep[4] = {C::where(exact[0]), C::where(exact[1]), C::where(exact[2]), C::where(exact[3])};
    put(keep);
  }
}

}  // namespace
}  // namespace amct_ext::cpu
