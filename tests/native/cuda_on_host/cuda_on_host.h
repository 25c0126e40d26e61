// What csrc/cuda needs of CUDA, for an ordinary C++ compiler: every thread of a block is a fiber of its own, so that
// __syncthreads and shuffles have their real meaning. For tests on machines without a card.
//
// Harsher than a card where that finds mistakes: shared memory is filled with NaN before each block, blocks and threads
// run in another order every time, and threads that wait for each other for ever are an error.
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
  amct_ext::on_host::share(&name, sizeof(name))

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

// Runs `kernel` once for every thread of every block.
void run(int64_t blocks, int threads, const std::function<void()>& kernel);

// Shared memory: filled with NaN by the first thread of a block that comes to it.
void share(void* memory, size_t bytes);
void wait_for_block();
// Hands `word` to the other lanes of the warp and returns what lane `from` handed over.
uint64_t exchange(uint64_t word, int from);

}  // namespace amct_ext::on_host

inline void __syncthreads() { amct_ext::on_host::wait_for_block(); }

template <typename T>
T __shfl_down_sync(unsigned, T v, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof(T));
  const int lane = static_cast<int>(threadIdx.x % 32);
  word = amct_ext::on_host::exchange(word, lane + lanes < 32 ? lane + lanes : lane);
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
