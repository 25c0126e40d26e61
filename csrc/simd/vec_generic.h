// Vectors of 16 bytes in the compiler's vector extension alone: SSE2, NEON and anything else.
#pragma once

#define AMCT_VEC_BYTES 16
#include "simd/vec_types.h"

namespace amct_ext::cpu {
namespace {

// SSE2 has maxima of few integer types; without them compilers make better code of plain loops.
#if defined(__SSE2__)
constexpr bool kHasIntegerMax = false;
#else
constexpr bool kHasIntegerMax = true;
#endif

template <typename T>
AMCT_INLINE IVec<T> load_masked(const T* from, const uint8_t* mask) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, mask, sizeof(bytes));
  return load_bits(from) & -__builtin_convertvector(bytes, IVec<T>);
}

template <typename V>
AMCT_INLINE bool any(V v) {
  const auto words = bit_cast<UVec<double>>(v);
  return (words[0] | words[1]) != 0;
}

template <typename T>
AMCT_INLINE bool any_ge(IVec<T> v, T limit) {
  return any(v >= bit_cast<Lane<T>>(limit));
}

template <typename V>
AMCT_INLINE V clamp(V v, V low, V high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Adding and taking away 2^(digits - 1) rounds what is smaller.
template <typename A>
AMCT_INLINE Vec<A> round_by_adding(Vec<A> v, A power) {
  const Mask<A> size = abs_bits<A>(v), sign = reinterpret_cast<Mask<A>>(v) ^ size;
  const Vec<A> magic = broadcast(power), sum = reinterpret_cast<Vec<A>>(size) + magic - magic;
  const Vec<A> whole = reinterpret_cast<Vec<A>>(reinterpret_cast<Mask<A>>(sum) | sign);
  return reinterpret_cast<Vec<A>>(size) < magic ? whole : v;
}
AMCT_INLINE Vec<float> round_even(Vec<float> v) { return round_by_adding<float>(v, 8388608.0f); }
AMCT_INLINE Vec<double> round_even(Vec<double> v) { return round_by_adding<double>(v, 4503599627370496.0); }

AMCT_INLINE Vec<double> to_double(HalfVec v) { return __builtin_convertvector(v, Vec<double>); }

// As widen() of a single value.
AMCT_INLINE Vec<float> widen_float16(HalfBits v) {
  const UVec32 bits = __builtin_convertvector(v, UVec32), sign = (bits & 0x8000u) << 16, body = (bits & 0x7fffu) << 13;
  const UVec32 scaled = reinterpret_cast<UVec32>(reinterpret_cast<Vec<float>>(body) * 5.192296858534828e+33f);
  return reinterpret_cast<Vec<float>>((body >= 0x0f800000u ? body | 0x7f800000u : scaled) | sign);
}

// As narrow() of a single value.
AMCT_INLINE HalfBits narrow_float16(Vec<float> v) {
  const UVec32 bits = reinterpret_cast<UVec32>(v), size = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const UVec32 normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
  const UVec32 small = reinterpret_cast<UVec32>(reinterpret_cast<Vec<float>>(size) + 0.5f) - 0x3f000000u;
  UVec32 result = size < 0x38800000u ? small : normal;
  result = size >= 0x477ff000u ? UVec32{} + 0x7c00u : result;
  return __builtin_convertvector(result | sign, HalfBits);
}

// Rounds by adding half of the last bit that stays, less one where that bit is even.
AMCT_INLINE UVec<BFloat16> narrow_bfloat16(Vec<float> first, Vec<float> second) {
  const auto even = reinterpret_cast<UVec32>(first), odd = reinterpret_cast<UVec32>(second);
  const UVec32 low = (even + 0x7fffu + ((even >> 16) & 1u)) >> 16;
  const UVec32 high = odd + 0x7fffu + ((odd >> 16) & 1u);
  return reinterpret_cast<UVec<BFloat16>>(low | (high & 0xffff0000u));
}

}  // namespace
}  // namespace amct_ext::cpu
