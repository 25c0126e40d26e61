// Device memory: vectorised loads and stores of 16 bytes, single values whose dtype is known at run time, bit patterns.
#pragma once

#include "cuda/engine/launch.cuh"

namespace amct_ext::cuda {

// The type that arithmetic on elements of type T uses.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The unsigned integer of the size of T.
template <int kSize>
struct UnsignedOfSize;
template <>
struct UnsignedOfSize<2> {
  using Type = uint16_t;
};
template <>
struct UnsignedOfSize<4> {
  using Type = uint32_t;
};
template <>
struct UnsignedOfSize<8> {
  using Type = uint64_t;
};
template <typename T>
using Bits = typename UnsignedOfSize<sizeof(T)>::Type;

template <typename To, typename From>
AMCT_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &v, sizeof(To));
  return result;
}

// The bits of |v|, which are ordered as the magnitudes are.
template <typename A>
AMCT_INLINE Bits<A> abs_bits(A v) {
  return bit_cast<Bits<A>>(v) & static_cast<Bits<A>>(~Bits<A>{0} >> 1);
}

// `V` neighbouring elements, moved by as few instructions as the hardware allows.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) AlignedVector {
  T val[V];
};

// Elements of a 16-byte load.
template <typename T>
constexpr int kVecSize = 16 / static_cast<int>(sizeof(T));

// Through the read-only cache (ld.global.nc): the kernel must not write this memory. In return the compiler may issue
// such loads ahead of earlier stores.
template <int V, typename T>
__device__ __forceinline__ AlignedVector<T, V> load_vector(const T* from) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * V;
  using Word = std::conditional_t<
      kBytes % 16 == 0, uint4,
      std::conditional_t<kBytes == 8, uint2,
                         std::conditional_t<kBytes == 4, unsigned int,
                                            std::conditional_t<kBytes == 2, unsigned short, unsigned char>>>>;
  static_assert(kBytes % sizeof(Word) == 0);
  AlignedVector<T, V> result;
  Word words[kBytes / sizeof(Word)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(kBytes / sizeof(Word)); ++i) {
    words[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  }
  memcpy(&result, words, kBytes);
  return result;
}

template <typename T>
__device__ __forceinline__ T load_scalar(const T* from) {
  return load_vector<1>(from).val[0];
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* to, const AlignedVector<T, V>& vector) {
  *reinterpret_cast<AlignedVector<T, V>*>(to) = vector;
}

// Whether 16-byte accesses are allowed at all these addresses. (Masks, a byte per element, would do with less.)
template <typename... Pointers>
bool vector_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Elements of a small tensor (clips, scales) that kernels read and write whatever its dtype.
struct ConstScalars {
  const void* data;
  at::ScalarType type;
};

struct Scalars {
  void* data;
  at::ScalarType type;
};

inline ConstScalars const_scalars(const at::Tensor& x) { return {x.const_data_ptr(), x.scalar_type()}; }
inline Scalars scalars(const at::Tensor& x) { return {x.mutable_data_ptr(), x.scalar_type()}; }

__device__ __forceinline__ double fetch_and_cast(ConstScalars from, int64_t i = 0) {
  switch (from.type) {
    case at::kDouble:
      return static_cast<const double*>(from.data)[i];
    case at::kBFloat16:
      return static_cast<double>(static_cast<float>(static_cast<const c10::BFloat16*>(from.data)[i]));
    case at::kHalf:
      return static_cast<double>(static_cast<float>(static_cast<const c10::Half*>(from.data)[i]));
    default:
      return static_cast<double>(static_cast<const float*>(from.data)[i]);
  }
}

__device__ __forceinline__ void cast_and_store(Scalars to, double v, int64_t i = 0) {
  switch (to.type) {
    case at::kDouble:
      static_cast<double*>(to.data)[i] = v;
      return;
    case at::kBFloat16:
      static_cast<c10::BFloat16*>(to.data)[i] = static_cast<c10::BFloat16>(static_cast<float>(v));
      return;
    case at::kHalf:
      static_cast<c10::Half*>(to.data)[i] = static_cast<c10::Half>(static_cast<float>(v));
      return;
    default:
      static_cast<float*>(to.data)[i] = static_cast<float>(v);
  }
}

// Volatile, so that threads may set the same flag without an atomic.
__device__ __forceinline__ void set_flag(bool* flag) { *static_cast<volatile bool*>(flag) = true; }

}  // namespace amct_ext::cuda
