// Kernel launches on the current stream, and the dispatch on a tensor's dtype.
//
// All that the kernels need of CUDA comes in here. With AMCT_CUDA_ON_HOST the same sources compile for the CPU, which
// runs every thread of every block (tests/native/cuda_on_host).
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

constexpr int kBlockThreads = 256;
constexpr int kWarpSize = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid_size, int block_size, const Arguments&... arguments) {
  if (grid_size == 0) return;
  TORCH_CHECK(grid_size <= std::numeric_limits<int>::max(), "amct_ext: a kernel of ", grid_size,
              " blocks is too large");
#ifdef AMCT_CUDA_ON_HOST
  on_host::run(grid_size, block_size, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  kernel<<<static_cast<unsigned>(grid_size), block_size, 0, c10::cuda::getCurrentCUDAStream()>>>(
      static_cast<Parameters>(arguments)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// A memset to zero in stream order.
inline void memset_zero(void* data, int64_t bytes) {
#ifdef AMCT_CUDA_ON_HOST
  std::memset(data, 0, bytes);
#else
  C10_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, c10::cuda::getCurrentCUDAStream()));
#endif
}

// Grid size of a grid-stride loop: `blocks`, but not more than the current device can hold at a time.
inline int64_t grid_stride_blocks(int64_t blocks) {
  int multiprocessors = 0;
#ifdef AMCT_CUDA_ON_HOST
  multiprocessors = 2;
#else
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
#endif
  constexpr int64_t kResidentBlocks = 2048 / kBlockThreads;  // per multiprocessor
  return blocks < multiprocessors * kResidentBlocks ? blocks : multiprocessors * kResidentBlocks;
}

// f.operator()<T>() for the element type of a tensor.
template <typename F>
void dispatch_floating(at::ScalarType type, const F& f) {
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
