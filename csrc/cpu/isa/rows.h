// Rows: vectors as wide as the instruction set has them, and two of them for every half-precision load. Explicit
// vectors where the order of a sum has to be fixed, or where compilers miss a plain loop.
#pragma once

#include <type_traits>

#include "cpu/isa/scalar.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace amct_ext::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kRowBytes = 64;
#elif defined(__AVX__)
constexpr int kRowBytes = 32;
#else
constexpr int kRowBytes = 16;
#endif

template <typename A>
struct RowTypes {
  using Lane = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A Row __attribute__((vector_size(kRowBytes)));
  typedef Lane Mask __attribute__((vector_size(kRowBytes)));
};

// Intrinsics of 512 bits are taken in their masked form, all lanes kept: it is the same instruction, but gcc 12 takes
// the plain forms for reads of uninitialised memory.

// Values of an arithmetic type, and what comparing them gives: all bits where true.
template <typename A>
using Row = typename RowTypes<A>::Row;
template <typename A>
using Mask = typename RowTypes<A>::Mask;
template <typename A>
constexpr int kRow = kRowBytes / static_cast<int>(sizeof(A));

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

template <typename A>
AMCT_INLINE Row<A> filled(A v) {
  return v - Row<A>{};
}

template <typename A>
AMCT_INLINE Mask<A> magnitude_bits_of(Row<A> v) {
  using Lane = typename RowTypes<A>::Lane;
  return reinterpret_cast<Mask<A>>(v) & static_cast<Lane>(~Traits<A>::kSign);
}

// NaN stays NaN.
template <typename R>
AMCT_INLINE R clamped(R v, R low, R high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

AMCT_INLINE Row<float> rounded(Row<float> v) {
#if defined(__AVX512F__)
  return _mm512_maskz_roundscale_ps(-1, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX__)
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Mask<float> size = magnitude_bits_of<float>(v), sign = reinterpret_cast<Mask<float>>(v) ^ size;
  const Row<float> magic = filled(8388608.0f), sum = reinterpret_cast<Row<float>>(size) + magic - magic;
  const Row<float> whole = reinterpret_cast<Row<float>>(reinterpret_cast<Mask<float>>(sum) | sign);
  return reinterpret_cast<Row<float>>(size) < magic ? whole : v;
#endif
}

AMCT_INLINE Row<double> rounded(Row<double> v) {
#if defined(__AVX512F__)
  return _mm512_maskz_roundscale_pd(-1, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX__)
  return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Mask<double> size = magnitude_bits_of<double>(v), sign = reinterpret_cast<Mask<double>>(v) ^ size;
  const Row<double> magic = filled(4503599627370496.0), sum = reinterpret_cast<Row<double>>(size) + magic - magic;
  const Row<double> whole = reinterpret_cast<Row<double>>(reinterpret_cast<Mask<double>>(sum) | sign);
  return reinterpret_cast<Row<double>>(size) < magic ? whole : v;
#endif
}

// a * b + zero in one rounding where the processor has that: the same result either way, unless a * b underflows.
AMCT_INLINE Row<float> product(Row<float> a, Row<float> b, Row<float> zero) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, zero);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, zero);
#else
  return a * b + zero;
#endif
}

AMCT_INLINE Row<double> product(Row<double> a, Row<double> b, Row<double> zero) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, zero);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, zero);
#else
  return a * b + zero;
#endif
}

// Whether a lane is `limit` or more, all being positive.
template <typename A>
AMCT_INLINE bool reach(Mask<A> lanes, A limit) {
  const Mask<A> reached = lanes >= as<typename RowTypes<A>::Lane>(limit);
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 8) return _mm512_movepi64_mask(reinterpret_cast<__m512i>(reached)) != 0;
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(reached)) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(reached), reinterpret_cast<__m256i>(reached));
#else
  const auto halves = reinterpret_cast<Mask<double>>(reached);
  return (halves[0] | halves[1]) != 0;
#endif
}

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
AMCT_INLINE Pair<T> load_pair(const T* from) {
  return {load_row<Row<T>>(from), load_row<Row<T>>(from + kRow<T>)};
}

// The words of bfloat16 hold two values; the upper half of a word is a float32 as it stands.
template <>
AMCT_INLINE Pair<BFloat16> load_pair(const BFloat16* from) {
  const auto words = load_row<Mask<float>>(from);
  return {reinterpret_cast<Row<float>>(words << 16),
          reinterpret_cast<Row<float>>(words & static_cast<int>(0xffff0000u))};
}

typedef uint16_t HalfBits __attribute__((vector_size(kRowBytes / 2)));
typedef uint32_t WordBits __attribute__((vector_size(kRowBytes)));

AMCT_INLINE Row<float> widen_row(HalfBits v) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(-1, reinterpret_cast<__m256i>(v));
#elif defined(__F16C__)
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
#if defined(__AVX512F__)
  return reinterpret_cast<HalfBits>(_mm512_maskz_cvtps_ph(-1, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
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

template <>
AMCT_INLINE Pair<Float16> load_pair(const Float16* from) {
  return {widen_row(load_row<HalfBits>(from)), widen_row(load_row<HalfBits>(from + kRow<float>))};
}

// Values rounded to the type. Not for NaN, nor for what is subnormal in float32: one instruction set would flush it.
template <typename T>
AMCT_INLINE void store_pair(T* to, Pair<T> v) {
  store_row(to, v.first);
  store_row(to + kRow<T>, v.second);
}
template <>
AMCT_INLINE void store_pair(BFloat16* to, Pair<BFloat16> v) {
#if defined(__AVX512BF16__)
  // Rounds both rows at once, one behind the other.
  using Halves = uint16_t __attribute__((vector_size(64)));
  constexpr Halves alternate = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v.second, v.first));
  store_row(to, _mm512_maskz_permutexvar_epi16(-1, reinterpret_cast<__m512i>(alternate), both));
#else
  const auto even = reinterpret_cast<WordBits>(v.first), odd = reinterpret_cast<WordBits>(v.second);
  const WordBits low = (even + 0x7fffu + ((even >> 16) & 1u)) >> 16;
  const WordBits high = odd + 0x7fffu + ((odd >> 16) & 1u);
  store_row(to, low | (high & 0xffff0000u));
#endif
}
template <>
AMCT_INLINE void store_pair(Float16* to, Pair<Float16> v) {
  store_row(to, narrow_row(v.first));
  store_row(to + kRow<float>, narrow_row(v.second));
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

}  // namespace
}  // namespace amct_ext::cpu
