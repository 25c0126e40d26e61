// Element types of the loops. Half formats are converted by integer arithmetic, which vectorises on every instruction
// set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "quant_math.h"

namespace amct_ext::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
AMCT_INLINE To as(From v) {
  To result;
  static_assert(sizeof(To) == sizeof(From));
  __builtin_memcpy(&result, &v, sizeof(To));
  return result;
}

// Arithmetic type and bit pattern of an element; `kInfinity` is the pattern of +Inf.
template <typename T>
struct Traits;
template <>
struct Traits<float> {
  using Acc = float;
  using Bits = uint32_t;
  static constexpr Bits kSign = 0x80000000u, kInfinity = 0x7f800000u;
};
template <>
struct Traits<double> {
  using Acc = double;
  using Bits = uint64_t;
  static constexpr Bits kSign = 0x8000000000000000u, kInfinity = 0x7ff0000000000000u;
};
template <>
struct Traits<BFloat16> {
  using Acc = float;
  using Bits = uint16_t;
  static constexpr Bits kSign = 0x8000u, kInfinity = 0x7f80u;
};
template <>
struct Traits<Float16> {
  using Acc = float;
  using Bits = uint16_t;
  static constexpr Bits kSign = 0x8000u, kInfinity = 0x7c00u;
};

template <typename T>
using Acc = typename Traits<T>::Acc;
template <typename T>
using Bits = typename Traits<T>::Bits;

template <typename T>
AMCT_INLINE Bits<T> magnitude_bits(T v) {
  return static_cast<Bits<T>>(as<Bits<T>>(v) & static_cast<Bits<T>>(~Traits<T>::kSign));
}

// v where it is kept, else +0; bits are moved, nothing is computed.
template <typename T>
AMCT_INLINE T masked(T v, bool keep) {
  const Bits<T> bits = as<Bits<T>>(v);
  return as<T>(static_cast<Bits<T>>(keep ? bits : Bits<T>(0)));
}

AMCT_INLINE float widen(float v) { return v; }
AMCT_INLINE double widen(double v) { return v; }
AMCT_INLINE float widen(BFloat16 v) { return as<float>(static_cast<uint32_t>(v.bits) << 16); }
AMCT_INLINE float widen(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t body = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  // Put the exponent where float32 has it and let one product re-bias it; subnormals come out right by the same
  // product.
  const float scaled = as<float>(body) * 5.192296858534828e+33f;  // 2^112
  const uint32_t special = body | 0x7f800000u;                    // Inf and NaN keep their payload
  const uint32_t bits = body >= 0x0f800000u ? special : as<uint32_t>(scaled);
  return as<float>(bits | sign);
}

template <typename T>
AMCT_INLINE T narrow(Acc<T> v);
template <>
AMCT_INLINE float narrow<float>(float v) {
  return v;
}
template <>
AMCT_INLINE double narrow<double>(double v) {
  return v;
}
template <>
AMCT_INLINE BFloat16 narrow<BFloat16>(float v) {
  const uint32_t bits = as<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
AMCT_INLINE Float16 narrow<Float16>(float v) {
  const uint32_t bits = as<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  // Normal results: re-bias the exponent, round half to even on the 13 bits that go. An overflow carries into infinity.
  const uint32_t normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the last kept bit with the last bit of the sum, so the addition rounds.
  const uint32_t small = as<uint32_t>(as<float>(size) + 0.5f) - 0x3f000000u;
  uint32_t result = size < 0x38800000u ? small : normal;
  result = size >= 0x477ff000u ? 0x7c00u : result;
  result = size > 0x7f800000u ? 0x7e00u : result;
  return {static_cast<uint16_t>(result | sign)};
}

// Rounding x / scale (+ offset) to an integer without a division: the product with the reciprocal is off by less than
// `near` on the codes that count, so it rounds the same way unless it lies that close to the middle between two
// integers. Loops note the largest distance from an integer; a step where it exceeds `limit` (one in some dozens) is
// done again with the division. The result has the bits of the division in every case.
template <typename A>
struct Reciprocal {
  A inverse, limit;
  bool usable;
};

template <typename A>
AMCT_INLINE Reciprocal<A> reciprocal(double scale, double lowest, double highest) {
  constexpr double ulp = sizeof(A) == 8 ? 2.220446049250313e-16 : 1.1920928955078125e-07;
  const double near = 2 * ulp * (highest - lowest + 2);
  // Far from overflow and underflow, for which the bound does not hold.
  const bool ordinary = scale > 1e-30 && scale < 1e30;
  return {A(1) / static_cast<A>(scale), static_cast<A>(0.5 - near), ordinary && near < 0.01};
}

template <typename A>
using BitsOf = typename Traits<A>::Bits;

// Values after which a step looks whether it must be done again. Half formats hold few different values, so one in the
// middle between two integers comes up often.
constexpr int64_t kRetry = 256, kHalfRetry = 64;
template <typename T>
constexpr int64_t kRetryOf = sizeof(T) == 2 ? kHalfRetry : kRetry;

// A step of a half format goes through float32 in the first-level cache: loops of one element size vectorise better,
// and many processors convert float16 themselves.
template <typename T>
constexpr bool kConverts = false;
template <>
constexpr bool kConverts<BFloat16> = true;

AMCT_INLINE void widen_step(const BFloat16* __restrict x, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(x[i]);
}

AMCT_INLINE void narrow_step(const float* __restrict v, BFloat16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<BFloat16>(v[i]);
}

#if defined(__F16C__)
template <>
constexpr bool kConverts<Float16> = true;

AMCT_INLINE void widen_step(const Float16* x, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
  for (; i < n; ++i) to[i] = widen(x[i]);
}

AMCT_INLINE void narrow_step(const float* v, Float16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    // The instruction keeps more of a NaN than `narrow` does: its sign and one bit are to stay.
    const __m256 value = _mm256_loadu_ps(v + i);
    const __m256 plain = _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffc00000u))));
    const __m256 number = _mm256_blendv_ps(value, plain, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(number, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) to[i] = narrow<Float16>(v[i]);
}
#endif

// loop(x, y) of at most kHalfRetry values, by way of float32 where that is faster.
template <typename T, typename Loop>
AMCT_INLINE void converted(const T* x, T* y, int64_t n, const Loop& loop) {
  if constexpr (kConverts<T>) {
    alignas(64) float in[kHalfRetry], out[kHalfRetry];
    widen_step(x, in, n);
    loop(static_cast<const float*>(in), static_cast<float*>(out));
    narrow_step(out, y, n);
  } else {
    loop(x, y);
  }
}

// Sixteen sums of float64, element i of a row going to sum i % 16, so that the order of additions does not depend on
// the instruction set. Vector types say what compilers fail to see in plain loops.
constexpr int kLanes = 16;

struct LaneSums {
  using Double8 = double __attribute__((vector_size(64)));
  using Float8 = float __attribute__((vector_size(32)));

  Double8 low = {}, high = {};

  AMCT_INLINE void add(const float* v) {
    Float8 first, second;
    __builtin_memcpy(&first, v, sizeof(first));
    __builtin_memcpy(&second, v + 8, sizeof(second));
#if defined(__AVX512F__)
    low += _mm512_maskz_cvtps_pd(-1, first);  // compilers make two halves of the general form
    high += _mm512_maskz_cvtps_pd(-1, second);
#else
    low += __builtin_convertvector(first, Double8);
    high += __builtin_convertvector(second, Double8);
#endif
  }

  AMCT_INLINE void add(const double* v) {
    Double8 first, second;
    __builtin_memcpy(&first, v, sizeof(first));
    __builtin_memcpy(&second, v + 8, sizeof(second));
    low += first;
    high += second;
  }

  AMCT_INLINE double total() const {
    double sum = 0;
    for (int i = 0; i < 8; ++i) sum += low[i];
    for (int i = 0; i < 8; ++i) sum += high[i];
    return sum;
  }
};

}  // namespace
}  // namespace amct_ext::cpu
