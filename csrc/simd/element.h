// Element types of the loops, a value at a time. Half formats are converted by integer arithmetic, which vectorises on
// every instruction set; vec2.h converts whole vectors of them.
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
AMCT_INLINE To bit_cast(From v) {
  To result;
  static_assert(sizeof(To) == sizeof(From));
  __builtin_memcpy(&result, &v, sizeof(To));
  return result;
}

// Arithmetic type and bit pattern of an element; `kInfBits` is the pattern of +Inf.
template <typename T>
struct Traits;
template <>
struct Traits<float> {
  using Acc = float;
  using Bits = uint32_t;
  static constexpr Bits kSignBit = 0x80000000u, kInfBits = 0x7f800000u;
};
template <>
struct Traits<double> {
  using Acc = double;
  using Bits = uint64_t;
  static constexpr Bits kSignBit = 0x8000000000000000u, kInfBits = 0x7ff0000000000000u;
};
template <>
struct Traits<BFloat16> {
  using Acc = float;
  using Bits = uint16_t;
  static constexpr Bits kSignBit = 0x8000u, kInfBits = 0x7f80u;
};
template <>
struct Traits<Float16> {
  using Acc = float;
  using Bits = uint16_t;
  static constexpr Bits kSignBit = 0x8000u, kInfBits = 0x7c00u;
};

template <typename T>
using Acc = typename Traits<T>::Acc;
template <typename T>
using Bits = typename Traits<T>::Bits;

// The bit pattern of |v|.
template <typename T>
AMCT_INLINE Bits<T> abs_bits(T v) {
  return static_cast<Bits<T>>(bit_cast<Bits<T>>(v) & static_cast<Bits<T>>(~Traits<T>::kSignBit));
}

// Element i, or +0 where a mask is given and drops it. A bool of the mask is a byte of 0 or 1.
template <bool kMasked, typename T>
AMCT_INLINE T load_element(const T* from, const uint8_t* mask, int64_t i) {
  if constexpr (!kMasked) return from[i];
  const Bits<T> keep = static_cast<Bits<T>>(0 - static_cast<Bits<T>>(mask[i]));
  return bit_cast<T>(static_cast<Bits<T>>(bit_cast<Bits<T>>(from[i]) & keep));
}

AMCT_INLINE float widen(float v) { return v; }
AMCT_INLINE double widen(double v) { return v; }
AMCT_INLINE float widen(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
AMCT_INLINE float widen(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t body = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  // Put the exponent where float32 has it and let one product re-bias it; subnormals come out right by the same
  // product.
  const float scaled = bit_cast<float>(body) * 5.192296858534828e+33f;  // 2^112
  const uint32_t special = body | 0x7f800000u;                          // Inf and NaN keep their payload
  const uint32_t bits = body >= 0x0f800000u ? special : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | sign);
}

// Rounded half to even; every NaN becomes the same quiet one.
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
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
AMCT_INLINE Float16 narrow<Float16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  // Normal results: re-bias the exponent, round half to even on the 13 bits that go. An overflow carries into infinity.
  const uint32_t normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the last kept bit with the last bit of the sum, so the addition rounds.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  uint32_t result = size < 0x38800000u ? small : normal;
  result = size >= 0x477ff000u ? 0x7c00u : result;
  result = size > 0x7f800000u ? 0x7e00u : result;
  return {static_cast<uint16_t>(result | sign)};
}

}  // namespace
}  // namespace amct_ext::cpu
