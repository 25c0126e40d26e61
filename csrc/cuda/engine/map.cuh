// Elementwise kernels: one pass over dense memory, in packets of 16 bytes.
//
// A job is a small struct that is copied to the device:
//   Local prepare() const           what a thread needs for all its elements; runs once per thread
//   bool wanted(const Local&)       whether there is anything to do
//   void run<V>(const Local&, i)    elements i .. i+V-1
#pragma once

#include "cuda/engine/launch.cuh"

namespace amct_ext::cuda {

// What is left behind the last packet goes in units of `kUnit`.
template <int V, int kUnit, typename Job>
__global__ void __launch_bounds__(kThreads) map_kernel(Job job, int64_t n) {
  const auto local = job.prepare();
  if (!job.wanted(local)) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, packets = n / V;
#pragma unroll 2
  for (int64_t i = first; i < packets; i += step) job.template run<V>(local, i * V);
  if constexpr (V > kUnit) {
    for (int64_t i = packets * V + first * kUnit; i < n; i += step * kUnit) job.template run<kUnit>(local, i);
  }
}

// At least one block, so that a job with results besides its elements writes them.
template <int V, int kUnit, typename Job>
void map_packets(const Job& job, int64_t n) {
  const int64_t blocks = filling(ceil_div(ceil_div(n, V), kThreads));
  launch(map_kernel<V, kUnit, Job>, blocks < 1 ? 1 : blocks, kThreads, job, n);
}

template <int V, typename Job>
void map(const Job& job, int64_t n, bool vector) {
  if (vector) {
    map_packets<V, 1>(job, n);
  } else {
    map_packets<1, 1>(job, n);
  }
}

}  // namespace amct_ext::cuda
