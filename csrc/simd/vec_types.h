// Values a register at a time, for loops that compilers do not make well of plain ones: vector types, and the few
// operations on bit patterns that those lack. Arithmetic is in rows.h.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd/element.h"

namespace amct_ext::cpu {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define AMCT_AVX512
constexpr int kRegister = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define AMCT_AVX2
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

// SSE2 has no maxima of most integers: there compilers make more of plain loops.
#if defined(__SSE2__) && !defined(AMCT_AVX512) && !defined(AMCT_AVX2)
constexpr bool kMaxima = false;
#else
constexpr bool kMaxima = true;
#endif

// Bit patterns of an element type. Patterns without their sign are compared as signed numbers, which every instruction
// set can; comparisons give all ones or zero.
template <int kBytes>
struct Register;
template <>
struct Register<2> {
  using Lane = int16_t;
  using Signed = int16_t __attribute__((vector_size(kRegister)));
  using Unsigned = uint16_t __attribute__((vector_size(kRegister)));
};
template <>
struct Register<4> {
  using Lane = int32_t;
  using Signed = int32_t __attribute__((vector_size(kRegister)));
  using Unsigned = uint32_t __attribute__((vector_size(kRegister)));
  using Floating = float __attribute__((vector_size(kRegister)));
};
template <>
struct Register<8> {
  using Lane = int64_t;
  using Signed = int64_t __attribute__((vector_size(kRegister)));
  using Unsigned = uint64_t __attribute__((vector_size(kRegister)));
  using Floating = double __attribute__((vector_size(kRegister)));
};

template <typename T>
using Lane = typename Register<sizeof(T)>::Lane;
template <typename T>
using V = typename Register<sizeof(T)>::Signed;
template <typename T>
using U = typename Register<sizeof(T)>::Unsigned;
template <typename T>
constexpr int kWidth = kRegister / static_cast<int>(sizeof(T));

template <typename T>
AMCT_INLINE V<T> load(const T* from) {
  V<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

// Begins to read some bytes that lie ahead of an address, if they exist.
template <int kBytes>
AMCT_INLINE void bring(const void* at, int64_t ahead) {
  constexpr int kLine = 64;
  const auto from = reinterpret_cast<uintptr_t>(at) + static_cast<uintptr_t>(ahead);
  for (int b = 0; b < kBytes; b += kLine) __builtin_prefetch(reinterpret_cast<const void*>(from + b));
}

// Zero where the mask, a byte of 0 or 1 for each value, does not keep it.
template <typename T>
AMCT_INLINE V<T> load_kept(const T* from, const uint8_t* mask) {
#if defined(AMCT_AVX512)
  if constexpr (sizeof(T) == 2) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
    return as<V<T>>(_mm512_maskz_loadu_epi16(_mm256_test_epi8_mask(bytes, bytes), from));
  } else if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
    return as<V<T>>(_mm512_maskz_loadu_epi32(_mm_test_epi8_mask(bytes, bytes), from));
  } else {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
    return as<V<T>>(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes)), from));
  }
#elif defined(AMCT_AVX2)
  if constexpr (sizeof(T) == 2) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
    return load(from) & -as<V<T>>(_mm256_cvtepu8_epi16(bytes));
  } else if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
    return load(from) & -as<V<T>>(_mm256_cvtepu8_epi32(bytes));
  } else {
    int bytes;
    __builtin_memcpy(&bytes, mask, sizeof(bytes));
    return load(from) & -as<V<T>>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)));
  }
#else
  typedef uint8_t Bytes __attribute__((vector_size(kWidth<T>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, mask, sizeof(bytes));
  return load(from) & -__builtin_convertvector(bytes, V<T>);
#endif
}

template <typename T>
AMCT_INLINE V<T> magnitudes(V<T> v) {
  return v & static_cast<Lane<T>>(~Traits<T>::kSign);
}

template <typename R>
AMCT_INLINE R larger(R a, R b) {
  return a > b ? a : b;
}
template <typename R>
AMCT_INLINE R smaller(R a, R b) {
  return a < b ? a : b;
}

// Whether a bit is set.
template <typename R>
AMCT_INLINE bool any(R v) {
#if defined(AMCT_AVX512)
  return _mm512_test_epi64_mask(as<__m512i>(v), as<__m512i>(v)) != 0;
#elif defined(AMCT_AVX2)
  return !_mm256_testz_si256(as<__m256i>(v), as<__m256i>(v));
#else
  const auto words = as<U<double>>(v);
  return (words[0] | words[1]) != 0;
#endif
}

}  // namespace
}  // namespace amct_ext::cpu
