// The part of CUDA that csrc/cuda uses, for an ordinary C++ compiler: an emulation for tests on machines without a GPU.
// Each thread of a block is a fiber, so __syncthreads and shuffles really switch between threads.
//
// It checks more than a GPU does: shared memory starts as NaN in every block, blocks and threads run in random order,
// and a deadlock is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define AMCT_DEVICE_KEY CPU

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)
#define AMCT_SHARED(name, ...) \
  static __VA_ARGS__;          \
  amct_ext::on_host::declare_shared(&name, sizeof(name))

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};

extern Index threadIdx, blockIdx, blockDim, gridDim;

namespace amct_ext::on_host {

// Calls `kernel` once for every thread of every block.
void run(int64_t blocks, int threads, const std::function<void()>& kernel);

// Declares shared memory. The first thread of a block that gets here fills it with NaN.
void declare_shared(void* memory, size_t bytes);
void sync_threads();
// Gives `word` to the other lanes of the warp and returns that of lane `from`.
uint64_t shuffle(uint64_t word, int from);

}  // namespace amct_ext::on_host

inline void __syncthreads() { amct_ext::on_host::sync_threads(); }

template <typename T>
T __shfl_down_sync(unsigned, T v, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof(T));
  const int lane = static_cast<int>(threadIdx.x % 32);
  word = amct_ext::on_host::shuffle(word, lane + lanes < 32 ? lane + lanes : lane);
  std::memcpy(&v, &word, sizeof(T));
  return v;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename T>
T atomicAdd(T* to, T v) {
  return __atomic_fetch_add(to, v, __ATOMIC_RELAXED);
}
