// Reductions over the elements of each channel in two stages: every block leaves one partial result, the partial
// results of a channel are joined in a fixed order. How the work is cut depends on the shape alone, so the bits do not
// depend on the device or on which block runs first.
//
// A job is a small struct that is copied to the device:
//   State                               plain data; State identity(), void join(State& into, const State& other)
//   Local prepare(channel) const        what a thread needs for the elements of a channel
//   void add<V>(const Local&, State&, i)    elements i .. i+V-1 in memory, all of that channel
//   void finish(const State&, channel)  writes the results of a channel; one thread
#pragma once

#include <algorithm>

#include "cuda/engine/launch.cuh"

namespace amct_ext::cuda {

template <typename State>
__device__ State shuffled_down(const State& state, int lanes) {
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

// The states of all threads of the block, in the first thread. Once in a kernel, by all threads.
template <typename Job>
__device__ void join_block(typename Job::State& state) {
  using State = typename Job::State;
  AMCT_SHARED(parts, State parts[kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) Job::join(state, shuffled_down(state, lanes));
  if (blockDim.x == kWarp) return;
  if (lane == 0) parts[warp] = state;
  __syncthreads();
  if (warp != 0) return;
  state = lane < static_cast<int>(blockDim.x) / kWarp ? parts[lane] : Job::identity();
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) Job::join(state, shuffled_down(state, lanes));
}

// Where the partial results of channel c lie: `groups` times `per` of them, group g at g * stride + c * per.
struct Partials {
  int64_t groups, per, stride;
};

// One channel after the other: block c * splits + s takes elements s * chunk .. of channel c.
template <int V, typename Job>
__global__ void __launch_bounds__(kThreads)
    reduce_rows(Job job, AxisView view, int64_t chunk, int64_t splits, typename Job::State* partial) {
  const int64_t channel = blockIdx.x / splits, split = blockIdx.x % splits;
  const int64_t size = view.outer * view.inner, begin = split * chunk;
  const int64_t end = begin + chunk < size ? begin + chunk : size;
  const auto local = job.prepare(channel);
  typename Job::State state = Job::identity();
  const auto at = [&](int64_t e) {
    const int64_t o = view.outer == 1 ? 0 : e / view.inner;
    return (o * view.size + channel) * view.inner + e - o * view.inner;
  };
  int64_t e = begin + static_cast<int64_t>(threadIdx.x) * V;
#pragma unroll 4
  for (; e + V <= end; e += static_cast<int64_t>(blockDim.x) * V) job.template add<V>(local, state, at(e));
  if constexpr (V > 1) {
    for (; e < end; ++e) job.template add<1>(local, state, at(e));
  }
  join_block<Job>(state);
  if (threadIdx.x != 0) return;
  if (splits == 1) {
    job.finish(state, channel);
  } else {
    partial[blockIdx.x] = state;
  }
}

// Short runs: neighbouring threads take neighbouring elements, whichever channels those belong to, and go along
// `outer`.
constexpr int kRowsAtOnce = kThreads / kWarp;

template <typename Job>
__global__ void __launch_bounds__(kThreads)
    reduce_columns(Job job, AxisView view, int64_t chunk, int64_t tiles, typename Job::State* partial) {
  using State = typename Job::State;
  AMCT_SHARED(parts, State parts[kRowsAtOnce][kWarp]);
  const int64_t width = view.size * view.inner, split = blockIdx.x / tiles;
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t column = blockIdx.x % tiles * kWarp + lane;
  State state = Job::identity();
  if (column < width) {
    const int64_t last = (split + 1) * chunk, end = last < view.outer ? last : view.outer;
    const auto local = job.prepare(column / view.inner);
#pragma unroll 4
    for (int64_t o = split * chunk + row; o < end; o += kRowsAtOnce) {
      job.template add<1>(local, state, o * width + column);
    }
  }
  parts[row][lane] = state;
  __syncthreads();
  if (row != 0 || column >= width) return;
  for (int r = 1; r < kRowsAtOnce; ++r) Job::join(state, parts[r][lane]);
  if (partial == nullptr) {
    job.finish(state, column);
  } else {
    partial[split * width + column] = state;
  }
}

template <typename Job>
__global__ void __launch_bounds__(kThreads)
    reduce_partials(Job job, Partials partials, const typename Job::State* partial) {
  typename Job::State state = Job::identity();
  const int64_t n = partials.groups * partials.per, channel = blockIdx.x;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const int64_t group = i / partials.per;
    Job::join(state, partial[group * partials.stride + channel * partials.per + i - group * partials.per]);
  }
  join_block<Job>(state);
  if (threadIdx.x == 0) job.finish(state, channel);
}

// Elements of a channel for one block.
inline int64_t chunk_of(int64_t size) {
  constexpr int64_t kLeast = 2048, kMost = 16384, kBlocks = 1024;
  return std::clamp(ceil_div(ceil_div(size, kBlocks), kLeast) * kLeast, kLeast, kMost);
}

inline int threads_for(int64_t packets) { return packets <= kWarp ? kWarp : packets <= 128 ? 128 : kThreads; }

// Whether every run consists of whole packets of V elements.
inline bool whole_packets(const AxisView& view, int64_t v) {
  return view.inner % v == 0 || (view.outer == 1 && view.size == 1);
}

// Short runs that lie apart would waste most of every memory access where a block takes one channel.
inline bool by_columns(const AxisView& view) { return view.inner < kWarp && view.size > 1 && view.outer > 0; }

// `vector`: the job's addresses allow packets of V. `kChannels` is false where there is always one channel.
template <int V, bool kChannels = true, typename Job>
void reduce(const Job& job, const AxisView& view, bool vector, const at::TensorOptions& options) {
  using State = typename Job::State;
  const auto room = [&](int64_t states) {
    return at::empty({states * static_cast<int64_t>(sizeof(State))}, options.dtype(at::kByte));
  };
  const auto second = [&](const Partials& partials, const State* partial) {
    const int threads = partials.groups * partials.per <= 64 ? kWarp : kThreads;
    launch(reduce_partials<Job>, view.size, threads, job, partials, partial);
  };
  if constexpr (kChannels) {
    if (by_columns(view)) {
      const int64_t width = view.size * view.inner, tiles = ceil_div(width, kWarp);
      const int64_t chunk = std::max<int64_t>(kWarp, ceil_div(view.outer, 64)), splits = ceil_div(view.outer, chunk);
      if (splits == 1 && view.inner == 1) {
        State* none = nullptr;
        launch(reduce_columns<Job>, tiles, kThreads, job, view, chunk, tiles, none);
        return;
      }
      const at::Tensor memory = room(splits * width);
      State* partial = static_cast<State*>(memory.mutable_data_ptr());
      launch(reduce_columns<Job>, splits * tiles, kThreads, job, view, chunk, tiles, partial);
      second({splits, view.inner, width}, partial);
      return;
    }
  }
  const int64_t size = view.outer * view.inner, chunk = chunk_of(size);
  const int64_t splits = std::max<int64_t>(1, ceil_div(size, chunk));  // an empty channel has a result too
  at::Tensor memory;
  State* partial = nullptr;
  if (splits > 1) {
    memory = room(view.size * splits);
    partial = static_cast<State*>(memory.mutable_data_ptr());
  }
  const bool packets = vector && whole_packets(view, V);
  const int threads = threads_for(ceil_div(std::min(size, chunk), packets ? V : 1));
  if (packets) {
    launch(reduce_rows<V, Job>, view.size * splits, threads, job, view, chunk, splits, partial);
  } else {
    launch(reduce_rows<1, Job>, view.size * splits, threads, job, view, chunk, splits, partial);
  }
  if (splits > 1) second({1, splits, 0}, partial);
}

}  // namespace amct_ext::cuda
