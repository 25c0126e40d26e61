// Reductions over the elements of each channel, in two stages: every block writes one partial state, then the partial
// states of a channel are combined in a fixed order. The partition depends on the shape alone, so the bits depend
// neither on the device nor on the order in which blocks run.
//
// A job is a small struct that is passed to the kernel by value:
//   State                                       plain data of whole 32-bit words
//   static State identity(), static void combine(State& into, const State& other)
//   auto prepare(channel) const                 constants of a channel, computed once per thread
//   void accumulate<V>(constants, State&, i) const  elements i .. i+V-1 in memory, all of that channel
//   void finalize(const State&, channel) const  writes the results of a channel; called by one thread
#pragma once

#include <algorithm>

#include "cuda/engine/memory.cuh"

namespace amct_ext::cuda {

template <typename State>
__device__ State warp_shuffle_down(const State& state, int lanes) {
  constexpr int kWords = sizeof(State) / sizeof(unsigned);
  static_assert(sizeof(State) % sizeof(unsigned) == 0 && std::is_trivially_copyable_v<State>);
  unsigned words[kWords];
  memcpy(words, &state, sizeof(State));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_down_sync(0xffffffffu, words[i], lanes);
  State result;
  memcpy(&result, words, sizeof(State));
  return result;
}

// Combines the states of all threads; the first thread gets the result. All threads of the block must call it, and only
// once in a kernel: its shared memory is not synchronised for another use.
template <typename Job>
__device__ void block_reduce(typename Job::State& state) {
  using State = typename Job::State;
  AMCT_SHARED(warp_states, State warp_states[kWarpSize]);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) Job::combine(state, warp_shuffle_down(state, lanes));
  if (blockDim.x == kWarpSize) return;
  if (lane == 0) warp_states[warp] = state;
  __syncthreads();
  if (warp != 0) return;
  state = lane < static_cast<int>(blockDim.x) / kWarpSize ? warp_states[lane] : Job::identity();
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) Job::combine(state, warp_shuffle_down(state, lanes));
}

// State of the jobs that sum in float64.
struct SumReduction {
  struct State {
    double sum;
  };
  AMCT_INLINE static State identity() { return {0}; }
  AMCT_INLINE static void combine(State& into, const State& other) { into.sum += other.sum; }
};

// Element e of a channel, counted in memory order, as an index into the tensor.
AMCT_INLINE int64_t element_index(const AxisView& view, int64_t channel, int64_t e) {
  const int64_t o = view.outer == 1 ? 0 : e / view.inner;
  return (o * view.size + channel) * view.inner + e - o * view.inner;
}

// First stage where each channel is long or contiguous. Block c * splits + s reduces elements s * chunk .. of channel
// c.
template <int V, typename Job>
__global__ void __launch_bounds__(kBlockThreads)
    reduce_rows(Job job, AxisView view, int64_t chunk, int64_t splits, typename Job::State* partial) {
  const int64_t channel = blockIdx.x / splits, split = blockIdx.x % splits;
  const int64_t size = view.outer * view.inner, begin = split * chunk;
  const int64_t end = begin + chunk < size ? begin + chunk : size;
  const auto constants = job.prepare(channel);
  typename Job::State state = Job::identity();
  int64_t e = begin + static_cast<int64_t>(threadIdx.x) * V;
#pragma unroll 4
  for (; e + V <= end; e += static_cast<int64_t>(blockDim.x) * V) {
    job.template accumulate<V>(constants, state, element_index(view, channel, e));
  }
  if constexpr (V > 1) {
    for (; e < end; ++e) job.template accumulate<1>(constants, state, element_index(view, channel, e));
  }
  block_reduce<Job>(state);
  if (threadIdx.x != 0) return;
  if (splits == 1) {
    job.finalize(state, channel);
  } else {
    partial[blockIdx.x] = state;
  }
}

// First stage where the runs of a channel are short: the tensor is a matrix [outer, size * inner] of which each thread
// reduces one column, so that the accesses of a warp coalesce across channels.
constexpr int kRowsPerTile = kBlockThreads / kWarpSize;

template <typename Job>
__global__ void __launch_bounds__(kBlockThreads)
    reduce_columns(Job job, AxisView view, int64_t chunk, int64_t tiles, typename Job::State* partial) {
  using State = typename Job::State;
  AMCT_SHARED(row_states, State row_states[kRowsPerTile][kWarpSize]);
  const int64_t width = view.size * view.inner, split = blockIdx.x / tiles;
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize;
  const int64_t column = blockIdx.x % tiles * kWarpSize + lane;
  State state = Job::identity();
  if (column < width) {
    const int64_t last = (split + 1) * chunk, end = last < view.outer ? last : view.outer;
    const auto constants = job.prepare(column / view.inner);
#pragma unroll 4
    for (int64_t o = split * chunk + row; o < end; o += kRowsPerTile) {
      job.template accumulate<1>(constants, state, o * width + column);
    }
  }
  row_states[row][lane] = state;
  __syncthreads();
  if (row != 0 || column >= width) return;
  for (int r = 1; r < kRowsPerTile; ++r) Job::combine(state, row_states[r][lane]);
  if (partial == nullptr) {
    job.finalize(state, column);
  } else {
    partial[split * width + column] = state;
  }
}

// The partial states of a channel: `groups` times `per_group`, those of group g from g * group_stride + channel *
// per_group on.
struct PartialLayout {
  int64_t groups, per_group, group_stride;
};

// Second stage, a block per channel.
template <typename Job>
__global__ void __launch_bounds__(kBlockThreads)
    reduce_partials(Job job, PartialLayout layout, const typename Job::State* partial) {
  typename Job::State state = Job::identity();
  const int64_t n = layout.groups * layout.per_group, channel = blockIdx.x;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const int64_t group = i / layout.per_group;
    Job::combine(state,
                 partial[group * layout.group_stride + channel * layout.per_group + i - group * layout.per_group]);
  }
  block_reduce<Job>(state);
  if (threadIdx.x == 0) job.finalize(state, channel);
}

// Elements of a channel that one block reduces.
inline int64_t chunk_size(int64_t size) {
  constexpr int64_t kMin = 2048, kMax = 16384, kTargetBlocks = 1024;
  return std::clamp(ceil_div(ceil_div(size, kTargetBlocks), kMin) * kMin, kMin, kMax);
}

inline int block_threads(int64_t vectors) {
  return vectors <= kWarpSize ? kWarpSize : vectors <= 128 ? 128 : kBlockThreads;
}

// Whether every run consists of whole vectors of V elements.
inline bool vectors_divide_runs(const AxisView& view, int64_t v) {
  return view.inner % v == 0 || (view.outer == 1 && view.size == 1);
}

// With a block per channel, runs shorter than a warp would waste most of each memory transaction.
inline bool use_columns(const AxisView& view) { return view.inner < kWarpSize && view.size > 1 && view.outer > 0; }

template <typename Job>
void launch_second_stage(const Job& job, int64_t channels, const PartialLayout& layout,
                         const typename Job::State* partial) {
  const int block_size = layout.groups * layout.per_group <= 64 ? kWarpSize : kBlockThreads;
  launch(reduce_partials<Job>, channels, block_size, job, layout, partial);
}

// `vectorized`: the job's addresses allow vectors of V elements. `kChannels` is false where there is always one
// channel, which saves the instances of the column kernel.
template <int V, bool kChannels = true, typename Job>
void reduce(const Job& job, const AxisView& view, bool vectorized, const at::TensorOptions& options) {
  using State = typename Job::State;
  const auto allocate = [&](int64_t states) {
    return at::empty({states * static_cast<int64_t>(sizeof(State))}, options.dtype(at::kByte));
  };
  if constexpr (kChannels) {
    if (use_columns(view)) {
      const int64_t width = view.size * view.inner, tiles = ceil_div(width, kWarpSize);
      const int64_t chunk = std::max<int64_t>(kWarpSize, ceil_div(view.outer, 64)),
                    splits = ceil_div(view.outer, chunk);
      if (splits == 1 && view.inner == 1) {
        State* none = nullptr;
        launch(reduce_columns<Job>, tiles, kBlockThreads, job, view, chunk, tiles, none);
        return;
      }
      const at::Tensor memory = allocate(splits * width);
      State* partial = static_cast<State*>(memory.mutable_data_ptr());
      launch(reduce_columns<Job>, splits * tiles, kBlockThreads, job, view, chunk, tiles, partial);
      launch_second_stage(job, view.size, {splits, view.inner, width}, partial);
      return;
    }
  }
  const int64_t size = view.outer * view.inner, chunk = chunk_size(size);
  const int64_t splits = std::max<int64_t>(1, ceil_div(size, chunk));  // an empty channel has a result too
  at::Tensor memory;
  State* partial = nullptr;
  if (splits > 1) {
    memory = allocate(view.size * splits);
    partial = static_cast<State*>(memory.mutable_data_ptr());
  }
  const bool whole_vectors = vectorized && vectors_divide_runs(view, V);
  const int block_size = block_threads(ceil_div(std::min(size, chunk), whole_vectors ? V : 1));
  if (whole_vectors) {
    launch(reduce_rows<V, Job>, view.size * splits, block_size, job, view, chunk, splits, partial);
  } else {
    launch(reduce_rows<1, Job>, view.size * splits, block_size, job, view, chunk, splits, partial);
  }
  if (splits > 1) launch_second_stage(job, view.size, {1, splits, 0}, partial);
}

}  // namespace amct_ext::cuda
