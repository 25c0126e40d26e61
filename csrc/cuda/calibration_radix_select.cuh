// The k-th largest magnitude on each side of zero, without a read on the host: a radix select over bit patterns, which
// are ordered as the magnitudes are. The steps:
//
//   chunk_extremes     largest magnitudes of each chunk of the data
//   init_selection     a lower bound from them: values below it cannot be the k-th largest
//   digit_histogram    counts the remaining values by their next digit       } once per digit, from the
//   select_digit       takes the digit in which the k-th largest value falls } most significant one on
#pragma once

#include "cuda/engine/reduce.cuh"

namespace amct_ext::cuda {

constexpr int kSides = 2;  // above and below zero
constexpr int kRadixBits = 8;
constexpr int kRadixDigits = 1 << kRadixBits;
constexpr int64_t kMaxChunks = 2048;

// State of the selection in device memory, read and written by one kernel after the other.
struct RadixSelection {
  uint64_t bound[kSides];   // a magnitude that at least `rank` values of the side reach
  uint64_t prefix[kSides];  // the digits selected so far; in the end the magnitude
  int64_t rank[kSides];     // from the largest, among the values with that prefix; 0 if the side has fewer values
  unsigned long long counts[kSides][kRadixDigits];
  int finite;
};

// Largest magnitudes of a part of the data, and whether all of it is finite.
template <typename A>
struct Extremes {
  Bits<A> largest[kSides];
  uint32_t finite, padding;
};

// For block_reduce.
template <typename A>
struct ExtremesReduction {
  using State = Extremes<A>;

  AMCT_INLINE static State identity() {
    State state{};
    state.finite = 1;
    return state;
  }
  AMCT_INLINE static void combine(State& into, const State& other) {
    for (int side = 0; side < kSides; ++side) {
      if (other.largest[side] > into.largest[side]) into.largest[side] = other.largest[side];
    }
    into.finite &= other.finite;
  }
};

// Zeros (and NaN) belong to neither side: -1.
template <typename A>
AMCT_INLINE int side_of(A v) {
  return v > A(0) ? 0 : v < A(0) ? 1 : -1;
}

// A block per chunk.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    chunk_extremes(const T* x, int64_t n, int64_t chunk, Extremes<Acc<T>>* extremes) {
  using A = Acc<T>;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * chunk, end = begin + chunk < n ? begin + chunk : n;
  auto state = ExtremesReduction<A>::identity();
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kBlockThreads) {
    const A v = static_cast<A>(load_scalar(x + i));
    const int side = side_of(v);
    if (side >= 0 && abs_bits(v) > state.largest[side]) state.largest[side] = abs_bits(v);
    if (!math::is_finite(v)) state.finite = 0;
  }
  block_reduce<ExtremesReduction<A>>(state);
  if (threadIdx.x == 0) extremes[blockIdx.x] = state;
}

// Puts the chunks into `groups` groups, at most `rank` of them. The smallest of the groups' maxima is reached once in
// each group, so with `rank` groups at least `rank` values reach it.
template <typename A>
__global__ void __launch_bounds__(kBlockThreads)
    init_selection(const Extremes<A>* extremes, int chunks, int64_t rank, int groups, RadixSelection* selection) {
  AMCT_SHARED(maxima, Bits<A> maxima[kSides][kMaxChunks]);
  AMCT_SHARED(finite, int finite[kBlockThreads]);
  int all_finite = 1;
  for (int group = threadIdx.x; group < groups; group += kBlockThreads) {
    Bits<A> largest[kSides] = {0, 0};
    for (int chunk = group; chunk < chunks; chunk += groups) {
      for (int side = 0; side < kSides; ++side) {
        const Bits<A> candidate = extremes[chunk].largest[side];
        if (candidate > largest[side]) largest[side] = candidate;
      }
      all_finite &= static_cast<int>(extremes[chunk].finite);
    }
    for (int side = 0; side < kSides; ++side) maxima[side][group] = largest[side];
  }
  finite[threadIdx.x] = all_finite;
  __syncthreads();
  if (threadIdx.x < kSides) {
    const int side = threadIdx.x;
    Bits<A> smallest = maxima[side][0];
    for (int group = 1; group < groups; ++group) {
      smallest = maxima[side][group] < smallest ? maxima[side][group] : smallest;
    }
    selection->bound[side] = groups < rank ? 0 : smallest;
    selection->prefix[side] = rank == 1 ? smallest : 0;
    selection->rank[side] = rank;
  }
  if (threadIdx.x == kSides) {
    int all = 1;
    for (int i = 0; i < kBlockThreads; ++i) all &= finite[i];
    selection->finite = all;
  }
  for (int digit = threadIdx.x; digit < kRadixDigits; digit += kBlockThreads) {
    for (int side = 0; side < kSides; ++side) selection->counts[side][digit] = 0;
  }
}

// Counts, by the digit at `shift`, the values that have the selected prefix and reach the bound.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    digit_histogram(const T* x, int64_t n, int shift, RadixSelection* selection) {
  using A = Acc<T>;
  // 32 bits suffice: a block counts less than 2^32 values, whatever fits in the memory of a GPU.
  AMCT_SHARED(counts, unsigned counts[kSides][kRadixDigits]);
  for (int digit = threadIdx.x; digit < kRadixDigits; digit += kBlockThreads) counts[0][digit] = counts[1][digit] = 0;
  __syncthreads();
  Bits<A> bounds[kSides], prefixes[kSides];
  for (int side = 0; side < kSides; ++side) {
    bounds[side] = static_cast<Bits<A>>(selection->bound[side]);
    prefixes[side] = static_cast<Bits<A>>(selection->prefix[side]);
  }
  const Bits<A> prefix_mask = shift + kRadixBits >= static_cast<int>(sizeof(A)) * 8
                                  ? Bits<A>{0}
                                  : static_cast<Bits<A>>(~Bits<A>{0} << (shift + kRadixBits));
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kBlockThreads) {
    const A v = static_cast<A>(load_scalar(x + i));
    const int side = side_of(v);
    if (side < 0) continue;
    const Bits<A> bits = abs_bits(v);
    if (bits < bounds[side] || (bits & prefix_mask) != prefixes[side]) continue;
    atomicAdd(&counts[side][bits >> shift & (kRadixDigits - 1)], 1u);
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < kRadixDigits; digit += kBlockThreads) {
    for (int side = 0; side < kSides; ++side) {
      if (counts[side][digit] != 0) {
        atomicAdd(&selection->counts[side][digit], static_cast<unsigned long long>(counts[side][digit]));
      }
    }
  }
}

// One block; a thread per side selects, and the counts are zero again for the next digit. `static`: not a template, so
// each source has its own.
static __global__ void __launch_bounds__(kBlockThreads) select_digit(int shift, RadixSelection* selection) {
  AMCT_SHARED(counts, unsigned long long counts[kSides][kRadixDigits]);
  for (int digit = threadIdx.x; digit < kRadixDigits; digit += kBlockThreads) {
    for (int side = 0; side < kSides; ++side) {
      counts[side][digit] = selection->counts[side][digit];
      selection->counts[side][digit] = 0;
    }
  }
  __syncthreads();
  if (threadIdx.x >= kSides) return;
  const int side = threadIdx.x;
  int64_t rank = selection->rank[side];
  if (rank == 0) return;
  int digit = kRadixDigits - 1;
  while (digit >= 0 && rank > static_cast<int64_t>(counts[side][digit])) {
    rank -= static_cast<int64_t>(counts[side][digit--]);
  }
  // digit < 0: the side has fewer values than the rank, so zero is the selected value.
  selection->rank[side] = digit < 0 ? 0 : rank;
  selection->prefix[side] = digit < 0 ? 0 : selection->prefix[side] | static_cast<uint64_t>(digit) << shift;
}

// Leaves in `selection` the magnitudes of the `rank`-th largest positive and negative values and whether all n values
// are finite. `extremes` has room for each of the `chunks`, at most kMaxChunks.
template <typename T>
void radix_select(const T* x, int64_t n, int64_t rank, int64_t chunk, int64_t chunks, Extremes<Acc<T>>* extremes,
                  RadixSelection* selection) {
  using A = Acc<T>;
  launch(chunk_extremes<T>, chunks, kBlockThreads, x, n, chunk, extremes);
  const int groups = static_cast<int>(std::min(chunks, rank));
  launch(init_selection<A>, 1, kBlockThreads, extremes, static_cast<int>(chunks), rank, groups, selection);
  for (int shift = sizeof(A) * 8 - kRadixBits; rank > 1 && shift >= 0; shift -= kRadixBits) {
    const int64_t blocks = grid_stride_blocks(ceil_div(n, kBlockThreads * 8));
    launch(digit_histogram<T>, blocks, kBlockThreads, x, n, shift, selection);
    launch(select_digit, 1, kBlockThreads, shift, selection);
  }
}

}  // namespace amct_ext::cuda
