// Where kernels meet the device: launches on the current stream, memory in packets of 16 bytes, single values in
// tensors.
//
// The kernels need nothing of CUDA but what this file brings in, so that tests can compile the same sources for the
// host (AMCT_CUDA_ON_HOST) and run every thread of every block where there is no card.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#ifdef AMCT_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>
#define AMCT_DEVICE_KEY CUDA
#define AMCT_SHARED(name, ...) __shared__ __VA_ARGS__
#endif

#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/layout.h"
#include "common/quant_math.h"

namespace amct_ext::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) {
  if (blocks == 0) return;
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "amct_ext: a kernel of ", blocks, " blocks is too large");
#ifdef AMCT_CUDA_ON_HOST
  on_host::run(blocks, threads, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  kernel<<<static_cast<unsigned>(blocks), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      static_cast<Parameters>(arguments)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// Zeros, in stream order.
inline void clear(void* data, int64_t bytes) {
#ifdef AMCT_CUDA_ON_HOST
  std::memset(data, 0, bytes);
#else
  C10_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, c10::cuda::getCurrentCUDAStream()));
#endif
}

// Blocks that fill the current device, but no more than there is work for.
inline int64_t filling(int64_t blocks) {
  int processors = 0;
#ifdef AMCT_CUDA_ON_HOST
  processors = 2;
#else
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
#endif
  constexpr int64_t kResident = 2048 / kThreads;
  return blocks < processors * kResident ? blocks : processors * kResident;
}

// Arithmetic type and bit pattern of an element.
template <int kSize>
struct BitsOfSize;
template <>
struct BitsOfSize<2> {
  using Type = uint16_t;
};
template <>
struct BitsOfSize<4> {
  using Type = uint32_t;
};
template <>
struct BitsOfSize<8> {
  using Type = uint64_t;
};
template <typename T>
using Bits = typename BitsOfSize<sizeof(T)>::Type;
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
AMCT_INLINE To as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &v, sizeof(To));
  return result;
}

// `V` elements that lie side by side, moved at once.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Packet {
  T v[V];
};

template <typename T>
constexpr int kPacket = 16 / static_cast<int>(sizeof(T));

// Reads through the cache for data that no thread of the kernel writes: such reads may be issued ahead of writes.
template <int V, typename T>
__device__ __forceinline__ Packet<T, V> load(const T* from) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * V;
  using Word = std::conditional_t<
      kBytes % 16 == 0, uint4,
      std::conditional_t<kBytes == 8, uint2,
                         std::conditional_t<kBytes == 4, unsigned int,
                                            std::conditional_t<kBytes == 2, unsigned short, unsigned char>>>>;
  static_assert(kBytes % sizeof(Word) == 0);
  Packet<T, V> result;
  Word words[kBytes / sizeof(Word)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(kBytes / sizeof(Word)); ++i) {
    words[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  }
  memcpy(&result, words, kBytes);
  return result;
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const Packet<T, V>& packet) {
  *reinterpret_cast<Packet<T, V>*>(to) = packet;
}

// Whether packets of 16 bytes may be moved at all these addresses (those of masks, a byte per element, need less).
template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Single values of tensors, read and written by kernels, whatever their type.
struct Value {
  const void* data;
  at::ScalarType type;
};

struct Result {
  void* data;
  at::ScalarType type;
};

inline Value value_of(const at::Tensor& x) { return {x.const_data_ptr(), x.scalar_type()}; }
inline Result result_of(const at::Tensor& x) { return {x.mutable_data_ptr(), x.scalar_type()}; }

__device__ __forceinline__ double read(Value value, int64_t i = 0) {
  switch (value.type) {
    case at::kDouble:
      return static_cast<const double*>(value.data)[i];
    case at::kBFloat16:
      return static_cast<double>(static_cast<float>(static_cast<const c10::BFloat16*>(value.data)[i]));
    case at::kHalf:
      return static_cast<double>(static_cast<float>(static_cast<const c10::Half*>(value.data)[i]));
    default:
      return static_cast<double>(static_cast<const float*>(value.data)[i]);
  }
}

__device__ __forceinline__ void write(Result result, double v, int64_t i = 0) {
  switch (result.type) {
    case at::kDouble:
      static_cast<double*>(result.data)[i] = v;
      return;
    case at::kBFloat16:
      static_cast<c10::BFloat16*>(result.data)[i] = static_cast<c10::BFloat16>(static_cast<float>(v));
      return;
    case at::kHalf:
      static_cast<c10::Half*>(result.data)[i] = static_cast<c10::Half>(static_cast<float>(v));
      return;
    default:
      static_cast<float*>(result.data)[i] = static_cast<float>(v);
  }
}

// A flag that any thread may set.
__device__ __forceinline__ void raise(bool* flag) { *static_cast<volatile bool*>(flag) = true; }

// f.operator()<T>() for the element type of a tensor.
template <typename F>
void by_type(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kDouble:
      return f.template operator()<double>();
    case at::kBFloat16:
      return f.template operator()<c10::BFloat16>();
    case at::kHalf:
      return f.template operator()<c10::Half>();
    default:
      return f.template operator()<float>();
  }
}

}  // namespace amct_ext::cuda
