// Elementwise kernels: one pass over dense memory in vectors of 16 bytes, as a grid-stride loop.
//
// A job is a small struct that is passed to the kernel by value:
//   auto prepare() const            constants of a thread, computed once
//   void run<V>(constants, i) const elements i .. i+V-1
//   bool enabled(constants) const   optional: false makes every thread return at once
#pragma once

#include "cuda/engine/memory.cuh"

namespace amct_ext::cuda {

// Elements after the last whole vector are handled `kTail` at a time.
template <int V, int kTail, typename Job>
__global__ void __launch_bounds__(kBlockThreads) map_kernel(Job job, int64_t n) {
  const auto constants = job.prepare();
  if constexpr (requires { job.enabled(constants); }) {
    if (!job.enabled(constants)) return;
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, vectors = n / V;
#pragma unroll 2
  for (int64_t i = first; i < vectors; i += step) job.template run<V>(constants, i * V);
  if constexpr (V > kTail) {
    for (int64_t i = vectors * V + first * kTail; i < n; i += step * kTail) job.template run<kTail>(constants, i);
  }
}

// At least one block, also for n = 0: a job may write results besides its elements.
template <int V, int kTail, typename Job>
void launch_map(const Job& job, int64_t n) {
  const int64_t blocks = grid_stride_blocks(ceil_div(ceil_div(n, V), kBlockThreads));
  launch(map_kernel<V, kTail, Job>, blocks < 1 ? 1 : blocks, kBlockThreads, job, n);
}

// `vectorized`: the job's addresses allow vectors of V elements.
template <int V, typename Job>
void map(const Job& job, int64_t n, bool vectorized) {
  if (vectorized) {
    launch_map<V, 1>(job, n);
  } else {
    launch_map<1, 1>(job, n);
  }
}

// One warp for a job on a handful of values.
template <typename Job>
void map_in_one_warp(const Job& job, int64_t n) {
  launch(map_kernel<1, 1, Job>, 1, kWarpSize, job, n);
}

}  // namespace amct_ext::cuda
