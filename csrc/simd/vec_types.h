// Vector types of the instruction set whose file includes this one: vectors of AMCT_VEC_BYTES bytes, as the compiler's
// vector extension. Arithmetic, comparison and `?:` work lane by lane; a comparison gives all ones or zero.
#pragma once

#include "simd/element.h"

namespace amct_ext::cpu {
namespace {

constexpr int kVecBytes = AMCT_VEC_BYTES;

template <int kBytes>
struct VecTypes;
template <>
struct VecTypes<2> {
  using Lane = int16_t;
  using Signed = int16_t __attribute__((vector_size(kVecBytes)));
  using Unsigned = uint16_t __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<4> {
  using Lane = int32_t;
  using Signed = int32_t __attribute__((vector_size(kVecBytes)));
  using Unsigned = uint32_t __attribute__((vector_size(kVecBytes)));
  using Floating = float __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<8> {
  using Lane = int64_t;
  using Signed = int64_t __attribute__((vector_size(kVecBytes)));
  using Unsigned = uint64_t __attribute__((vector_size(kVecBytes)));
  using Floating = double __attribute__((vector_size(kVecBytes)));
};

// Values of an arithmetic type.
template <typename A>
using Vec = typename VecTypes<sizeof(A)>::Floating;
// Bit patterns of an element type, also half formats: signed, because every instruction set compares signed integers
// and patterns without their sign bit are never negative.
template <typename T>
using IVec = typename VecTypes<sizeof(T)>::Signed;
template <typename T>
using UVec = typename VecTypes<sizeof(T)>::Unsigned;
// What comparing vectors gives.
template <typename A>
using Mask = IVec<A>;
template <typename T>
using Lane = typename VecTypes<sizeof(T)>::Lane;
template <typename T>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

using UVec32 = UVec<float>;
// Half a vector: as many floats as a vector has doubles; as many 16-bit patterns as it has floats.
using HalfVec = float __attribute__((vector_size(kVecBytes / 2)));
typedef uint16_t HalfBits __attribute__((vector_size(kVecBytes / 2)));
typedef int16_t SignedHalfBits __attribute__((vector_size(kVecBytes / 2)));

template <typename V>
AMCT_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
AMCT_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

// The bit patterns of elements.
template <typename T>
AMCT_INLINE IVec<T> load_bits(const T* from) {
  IVec<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <typename T>
AMCT_INLINE IVec<T> abs_bits(IVec<T> v) {
  return v & static_cast<Lane<T>>(~Traits<T>::kSignBit);
}
template <typename A>
AMCT_INLINE Mask<A> abs_bits(Vec<A> v) {
  return abs_bits<A>(reinterpret_cast<Mask<A>>(v));
}

template <typename A>
AMCT_INLINE Vec<A> broadcast(A v) {
  return v - Vec<A>{};
}

// b where a lane is NaN.
template <typename V>
AMCT_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
AMCT_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

}  // namespace
}  // namespace amct_ext::cpu
