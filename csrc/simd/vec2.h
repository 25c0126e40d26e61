// Two rows at a time: how element types are read into arithmetic and written back, half formats in registers.
#pragma once

#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

using WordBits = U<float>;
typedef uint16_t HalfBits __attribute__((vector_size(kRegister / 2)));
typedef int16_t SignedHalfBits __attribute__((vector_size(kRegister / 2)));

// Two rows of arithmetic values: what is loaded and stored at a time. Half formats fill a row of bits with both.
template <typename T>
struct Pair {
  Row<Acc<T>> first, second;
};
template <typename T>
constexpr int kPair = 2 * kRow<Acc<T>>;

// Whether neighbours go to different rows of a pair; else the first row holds the first values.
template <typename T>
constexpr bool kAlternating = false;
template <>
constexpr bool kAlternating<BFloat16> = true;
template <typename T>
constexpr int kSecond = kAlternating<T> ? 1 : kRow<Acc<T>>;  // the first value of the second row

template <typename T>
AMCT_INLINE Pair<T> load_pair(const T* from) {
  return {load_row<Row<T>>(from), load_row<Row<T>>(from + kRow<T>)};
}

// A register of a half format and the pair of its values. The words of bfloat16 hold two; the upper half of a word is a
// float32 as it stands.
template <typename T>
AMCT_INLINE Pair<T> widened(V<T> bits);
template <>
AMCT_INLINE Pair<BFloat16> widened<BFloat16>(V<BFloat16> bits) {
  const auto words = reinterpret_cast<WordBits>(bits);
  return {reinterpret_cast<Row<float>>(words << 16), reinterpret_cast<Row<float>>(words & 0xffff0000u)};
}
template <>
AMCT_INLINE Pair<BFloat16> load_pair(const BFloat16* from) {
  return widened<BFloat16>(load(from));
}

AMCT_INLINE Row<float> widen_row(HalfBits v) {
#if defined(AMCT_AVX512)
  return _mm512_maskz_cvtph_ps(-1, reinterpret_cast<__m256i>(v));
#elif defined(AMCT_AVX2)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v));
#else
  // As widen() of a single value.
  const WordBits bits = __builtin_convertvector(v, WordBits), sign = (bits & 0x8000u) << 16,
                 body = (bits & 0x7fffu) << 13;
  const WordBits scaled = reinterpret_cast<WordBits>(reinterpret_cast<Row<float>>(body) * 5.192296858534828e+33f);
  return reinterpret_cast<Row<float>>((body >= 0x0f800000u ? body | 0x7f800000u : scaled) | sign);
#endif
}

// Not for NaN.
AMCT_INLINE HalfBits narrow_row(Row<float> v) {
#if defined(AMCT_AVX512)
  return reinterpret_cast<HalfBits>(_mm512_maskz_cvtps_ph(-1, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(AMCT_AVX2)
  return reinterpret_cast<HalfBits>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  // As narrow() of a single value.
  const WordBits bits = reinterpret_cast<WordBits>(v), size = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const WordBits normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
  const WordBits small = reinterpret_cast<WordBits>(reinterpret_cast<Row<float>>(size) + 0.5f) - 0x3f000000u;
  WordBits result = size < 0x38800000u ? small : normal;
  result = size >= 0x477ff000u ? WordBits{} + 0x7c00u : result;
  return __builtin_convertvector(result | sign, HalfBits);
#endif
}

struct TwoHalves {
  HalfBits first, second;
};
template <>
AMCT_INLINE Pair<Float16> widened<Float16>(V<Float16> bits) {
  const auto halves = as<TwoHalves>(bits);
  return {widen_row(halves.first), widen_row(halves.second)};
}
template <>
AMCT_INLINE Pair<Float16> load_pair(const Float16* from) {
  return {widen_row(load_row<HalfBits>(from)), widen_row(load_row<HalfBits>(from + kRow<float>))};
}

// What the mask, a byte of 0 or 1 for each value, does not keep reads as +0.
template <typename T>
AMCT_INLINE Pair<T> load_kept_pair(const T* from, const uint8_t* mask) {
  return {reinterpret_cast<Row<T>>(load_kept(from, mask)),
          reinterpret_cast<Row<T>>(load_kept(from + kRow<T>, mask + kRow<T>))};
}
template <>
AMCT_INLINE Pair<BFloat16> load_kept_pair(const BFloat16* from, const uint8_t* mask) {
  return widened<BFloat16>(load_kept(from, mask));
}
template <>
AMCT_INLINE Pair<Float16> load_kept_pair(const Float16* from, const uint8_t* mask) {
  return widened<Float16>(load_kept(from, mask));
}

// Values rounded to the type. Not for NaN, nor for what is subnormal in float32: one instruction set would flush it.
AMCT_INLINE U<BFloat16> narrow_words(Pair<BFloat16> v) {
#if defined(__AVX512BF16__)
  // Rounds both rows at once, one behind the other.
  constexpr U<BFloat16> alternate = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v.second, v.first));
  return as<U<BFloat16>>(_mm512_maskz_permutexvar_epi16(-1, reinterpret_cast<__m512i>(alternate), both));
#else
  const auto even = reinterpret_cast<WordBits>(v.first), odd = reinterpret_cast<WordBits>(v.second);
  const WordBits low = (even + 0x7fffu + ((even >> 16) & 1u)) >> 16;
  const WordBits high = odd + 0x7fffu + ((odd >> 16) & 1u);
#if defined(AMCT_AVX2)
  return as<U<BFloat16>>(_mm256_blend_epi16(as<__m256i>(low), as<__m256i>(high), 0xaa));
#else
  return reinterpret_cast<U<BFloat16>>(low | (high & 0xffff0000u));
#endif
#endif
}
template <typename T>
AMCT_INLINE void store_pair(T* to, Pair<T> v) {
  store_row(to, v.first);
  store_row(to + kRow<T>, v.second);
}
template <>
AMCT_INLINE void store_pair(BFloat16* to, Pair<BFloat16> v) {
  store_row(to, narrow_words(v));
}
template <>
AMCT_INLINE void store_pair(Float16* to, Pair<Float16> v) {
  store_row(to, narrow_row(v.first));
  store_row(to + kRow<float>, narrow_row(v.second));
}

// Half formats: the same between a negative bound and a positive one, both rows at once as bit patterns. Negative ones
// are the largest as unsigned numbers, so two integer minima do it.
template <typename Signed, typename Unsigned>
AMCT_INLINE Signed between(Unsigned bits, uint16_t low, uint16_t high) {
  const auto above = reinterpret_cast<Signed>(smaller(bits, Unsigned{} + low));
  return smaller(above, Signed{} + static_cast<int16_t>(high));
}
AMCT_INLINE void store_between(BFloat16* to, Pair<BFloat16> v, BFloat16 low, BFloat16 high) {
  store_row(to, between<V<BFloat16>>(narrow_words(v), low.bits, high.bits));
}
AMCT_INLINE void store_between(Float16* to, Pair<Float16> v, Float16 low, Float16 high) {
  store_row(to, between<SignedHalfBits>(narrow_row(v.first), low.bits, high.bits));
  store_row(to + kRow<float>, between<SignedHalfBits>(narrow_row(v.second), low.bits, high.bits));
}

// Values of a pair where the masks are set, else +0; bits are moved, nothing is computed.
template <typename T>
AMCT_INLINE void store_kept(T* to, const T* from, Mask<Acc<T>> first, Mask<Acc<T>> second) {
  store_row(to, load_row<Mask<T>>(from) & first);
  store_row(to + kRow<T>, load_row<Mask<T>>(from + kRow<T>) & second);
}
template <>
AMCT_INLINE void store_kept(BFloat16* to, const BFloat16* from, Mask<float> first, Mask<float> second) {
  const auto low = reinterpret_cast<WordBits>(first) >> 16, high = reinterpret_cast<WordBits>(second) & 0xffff0000u;
  store_row(to, load_row<WordBits>(from) & (low | high));
}
template <>
AMCT_INLINE void store_kept(Float16* to, const Float16* from, Mask<float> first, Mask<float> second) {
  store_row(to, load_row<HalfBits>(from) & __builtin_convertvector(reinterpret_cast<WordBits>(first), HalfBits));
  store_row(to + kRow<float>, load_row<HalfBits>(from + kRow<float>) &
                                  __builtin_convertvector(reinterpret_cast<WordBits>(second), HalfBits));
}

// Integers of at most 8 bits as bytes; NaN gives 0.
template <typename A>
AMCT_INLINE auto integers(Row<A> code) {
  typedef int32_t Words __attribute__((vector_size(4 * kRow<A>)));
  return __builtin_convertvector(where(code == code, code), Words);
}
template <typename A>
AMCT_INLINE void store_bytes(int8_t* to, Row<A> code) {
  typedef int8_t Bytes __attribute__((vector_size(kRow<A>)));
  const Bytes bytes = __builtin_convertvector(integers<A>(code), Bytes);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}
template <typename T>
AMCT_INLINE void store_codes(int8_t* to, Pair<T> code) {
  store_bytes<Acc<T>>(to, code.first);
  store_bytes<Acc<T>>(to + kRow<Acc<T>>, code.second);
}
template <>
AMCT_INLINE void store_codes(int8_t* to, Pair<BFloat16> code) {
  const auto low = integers<float>(code.first) & 0xff, high = integers<float>(code.second) << 8;
  store_row(to, __builtin_convertvector(reinterpret_cast<WordBits>(low | high), HalfBits));
}

}  // namespace
}  // namespace amct_ext::cpu
