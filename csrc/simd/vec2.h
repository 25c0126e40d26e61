// Vec2<T>: the arithmetic values of two vectors, what loops load and store at a time. Here element types, half formats
// above all, are read into arithmetic and written back.
#pragma once

#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

template <typename T>
struct Vec2 {
  Vec<Acc<T>> first, second;
};
template <typename T>
constexpr int kLanes2 = 2 * kLanes<Acc<T>>;

// Whether even elements go to the first vector and odd ones to the second; else the first holds the first half.
template <typename T>
constexpr bool kInterleaved = false;
template <>
constexpr bool kInterleaved<BFloat16> = true;
// The element that lane 0 of the second vector holds.
template <typename T>
constexpr int kSecondStart = kInterleaved<T> ? 1 : kLanes<Acc<T>>;

// A vector of half-format patterns as arithmetic values. A 32-bit word holds two bfloat16; its upper half is a float32
// as it stands.
template <typename T>
AMCT_INLINE Vec2<T> widen2(IVec<T> bits);
template <>
AMCT_INLINE Vec2<BFloat16> widen2<BFloat16>(IVec<BFloat16> bits) {
  const auto words = reinterpret_cast<UVec32>(bits);
  return {reinterpret_cast<Vec<float>>(words << 16), reinterpret_cast<Vec<float>>(words & 0xffff0000u)};
}
struct HalfBits2 {
  HalfBits first, second;
};
template <>
AMCT_INLINE Vec2<Float16> widen2<Float16>(IVec<Float16> bits) {
  const auto halves = bit_cast<HalfBits2>(bits);
  return {widen_float16(halves.first), widen_float16(halves.second)};
}

template <typename T>
AMCT_INLINE Vec2<T> load2(const T* from) {
  return {load<Vec<T>>(from), load<Vec<T>>(from + kLanes<T>)};
}
template <>
AMCT_INLINE Vec2<BFloat16> load2(const BFloat16* from) {
  return widen2<BFloat16>(load_bits(from));
}
template <>
AMCT_INLINE Vec2<Float16> load2(const Float16* from) {
  return {widen_float16(load<HalfBits>(from)), widen_float16(load<HalfBits>(from + kLanes<float>))};
}

// +0 where the mask, a byte of 0 or 1 for each value, is 0.
template <typename T>
AMCT_INLINE Vec2<T> load2_masked(const T* from, const uint8_t* mask) {
  return {reinterpret_cast<Vec<T>>(load_masked(from, mask)),
          reinterpret_cast<Vec<T>>(load_masked(from + kLanes<T>, mask + kLanes<T>))};
}
template <>
AMCT_INLINE Vec2<BFloat16> load2_masked(const BFloat16* from, const uint8_t* mask) {
  return widen2<BFloat16>(load_masked(from, mask));
}
template <>
AMCT_INLINE Vec2<Float16> load2_masked(const Float16* from, const uint8_t* mask) {
  return widen2<Float16>(load_masked(from, mask));
}

// Rounds to the type. Half formats: not for NaN. bfloat16: not for float32 subnormals, which AVX512BF16 flushes to
// zero.
template <typename T>
AMCT_INLINE void store2(T* to, Vec2<T> v) {
  store(to, v.first);
  store(to + kLanes<T>, v.second);
}
template <>
AMCT_INLINE void store2(BFloat16* to, Vec2<BFloat16> v) {
  store(to, narrow_bfloat16(v.first, v.second));
}
template <>
AMCT_INLINE void store2(Float16* to, Vec2<Float16> v) {
  store(to, narrow_float16(v.first));
  store(to + kLanes<float>, narrow_float16(v.second));
}

// Half formats: rounds, then clamps the patterns between a negative and a positive bound. As unsigned integers negative
// values are the largest, so two integer minima do it.
template <typename Signed, typename Unsigned>
AMCT_INLINE Signed clamp_bits(Unsigned bits, uint16_t low, uint16_t high) {
  const auto above = reinterpret_cast<Signed>(min(bits, Unsigned{} + low));
  return min(above, Signed{} + static_cast<int16_t>(high));
}
AMCT_INLINE void store2_clamped(BFloat16* to, Vec2<BFloat16> v, BFloat16 low, BFloat16 high) {
  store(to, clamp_bits<IVec<BFloat16>>(narrow_bfloat16(v.first, v.second), low.bits, high.bits));
}
AMCT_INLINE void store2_clamped(Float16* to, Vec2<Float16> v, Float16 low, Float16 high) {
  store(to, clamp_bits<SignedHalfBits>(narrow_float16(v.first), low.bits, high.bits));
  store(to + kLanes<float>, clamp_bits<SignedHalfBits>(narrow_float16(v.second), low.bits, high.bits));
}

// Copies the bit patterns where the masks are set and writes +0 elsewhere.
template <typename T>
AMCT_INLINE void copy2_masked(T* to, const T* from, Mask<Acc<T>> first, Mask<Acc<T>> second) {
  store(to, load<Mask<T>>(from) & first);
  store(to + kLanes<T>, load<Mask<T>>(from + kLanes<T>) & second);
}
template <>
AMCT_INLINE void copy2_masked(BFloat16* to, const BFloat16* from, Mask<float> first, Mask<float> second) {
  const auto low = reinterpret_cast<UVec32>(first) >> 16, high = reinterpret_cast<UVec32>(second) & 0xffff0000u;
  store(to, load<UVec32>(from) & (low | high));
}
template <>
AMCT_INLINE void copy2_masked(Float16* to, const Float16* from, Mask<float> first, Mask<float> second) {
  store(to, load<HalfBits>(from) & __builtin_convertvector(reinterpret_cast<UVec32>(first), HalfBits));
  store(to + kLanes<float>,
        load<HalfBits>(from + kLanes<float>) & __builtin_convertvector(reinterpret_cast<UVec32>(second), HalfBits));
}

// Integers of at most 8 bits as int8; NaN gives 0.
template <typename A>
AMCT_INLINE auto to_int32(Vec<A> v) {
  typedef int32_t Words __attribute__((vector_size(4 * kLanes<A>)));
  return __builtin_convertvector(zero_unless(v == v, v), Words);
}
template <typename A>
AMCT_INLINE void store_int8(int8_t* to, Vec<A> v) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes<A>)));
  const Bytes bytes = __builtin_convertvector(to_int32<A>(v), Bytes);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}
template <typename T>
AMCT_INLINE void store2_int8(int8_t* to, Vec2<T> v) {
  store_int8<Acc<T>>(to, v.first);
  store_int8<Acc<T>>(to + kLanes<Acc<T>>, v.second);
}
template <>
AMCT_INLINE void store2_int8(int8_t* to, Vec2<BFloat16> v) {
  const auto low = to_int32<float>(v.first) & 0xff, high = to_int32<float>(v.second) << 8;
  store(to, __builtin_convertvector(reinterpret_cast<UVec32>(low | high), HalfBits));
}

}  // namespace
}  // namespace amct_ext::cpu
