// Element types of the loops, a value at a time. Half formats are converted by integer arithmetic, which vectorises on
// every instruction set; registers of them in pairs.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/quant_math.h"

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

// Weights that are masked read as +0 where they are not kept.
template <bool kMasked, typename T>
AMCT_INLINE T weight(const T* w, const uint8_t* mask, int64_t i) {
  if constexpr (!kMasked) return w[i];
  const Bits<T> keep = static_cast<Bits<T>>(0 - static_cast<Bits<T>>(mask[i]));  // a bool is 0 or 1
  return as<T>(static_cast<Bits<T>>(as<Bits<T>>(w[i]) & keep));
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

}  // namespace
}  // namespace amct_ext::cpu
