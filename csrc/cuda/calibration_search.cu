// search_clip_range, without a look at the host: extremes of pieces of the data; where the extreme value is not the
// largest one, its bits by radix selection among the few values that can be it; one pass for the errors of all ranges;
// the choice.
#include <torch/library.h>

#include <tuple>

#include "common/check.h"
#include "cuda/engine/map.cuh"
#include "cuda/engine/reduce.cuh"
#include "cuda/engine/round.cuh"

namespace amct_ext::cuda {
namespace {

using at::Tensor;
using math::kCandidates;

constexpr double kPercentile = 0.999999;
constexpr int kSides = 2;  // above and below zero
constexpr int kDigit = 8;  // bits that a pass of the selection settles
constexpr int kBins = 1 << kDigit;
constexpr int kSlots = 64;   // candidates, rounded up
constexpr int kTile = 1024;  // values that a block holds at a time
constexpr int kSplit = kThreads / kSlots;
constexpr int64_t kMostPieces = 2048;

// What passes hand on, on the device. Magnitudes are bit patterns, which are ordered as the numbers are.
struct Selection {
  uint64_t bound[kSides];   // a magnitude that at least `rank` values of the side reach
  uint64_t prefix[kSides];  // the bits settled so far; at the end the magnitude
  int64_t rank[kSides];     // counted from the largest, among the values with that prefix; 0: fewer values than that
  unsigned long long counts[kSides][kBins];
  int finite;
};

// Extremes of pieces: largest magnitudes above and below zero.
template <typename A>
struct Extremes {
  Bits<A> size[kSides];
  uint32_t finite, unused;
};

template <typename T>
struct Gather {
  using A = Acc<T>;
  using State = Extremes<A>;

  const T* x;

  AMCT_INLINE static State identity() {
    State state{};
    state.finite = 1;
    return state;
  }
  AMCT_INLINE static void join(State& into, const State& other) {
    for (int side = 0; side < kSides; ++side) {
      if (other.size[side] > into.size[side]) into.size[side] = other.size[side];
    }
    into.finite &= other.finite;
  }
};

// Which side a value lies on, and its magnitude; zeros lie on neither.
template <typename A>
AMCT_INLINE int side_of(A v) {
  return v > A(0) ? 0 : v < A(0) ? 1 : -1;
}
template <typename A>
AMCT_INLINE Bits<A> magnitude(A v) {
  return as<Bits<A>>(v) & static_cast<Bits<A>>(~Bits<A>{0} >> 1);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gather(const T* x, int64_t n, int64_t piece, Extremes<Acc<T>>* extremes) {
  using A = Acc<T>;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * piece, end = begin + piece < n ? begin + piece : n;
  auto state = Gather<T>::identity();
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const A v = static_cast<A>(load<1>(x + i).v[0]);
    const int side = side_of(v);
    if (side >= 0 && magnitude(v) > state.size[side]) state.size[side] = magnitude(v);
    if (!math::is_finite(v)) state.finite = 0;
  }
  join_block<Gather<T>>(state);
  if (threadIdx.x == 0) extremes[blockIdx.x] = state;
}

// `groups` sets of pieces hold as many different values that reach the smallest of their maxima.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    bound(const Extremes<A>* extremes, int pieces, int64_t rank, int groups, Selection* selection) {
  AMCT_SHARED(maxima, Bits<A> maxima[kSides][kMostPieces]);
  AMCT_SHARED(finite, int finite[kThreads]);
  int all_finite = 1;
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    Bits<A> most[kSides] = {0, 0};
    for (int piece = group; piece < pieces; piece += groups) {
      for (int side = 0; side < kSides; ++side) {
        const Bits<A> size = extremes[piece].size[side];
        if (size > most[side]) most[side] = size;
      }
      all_finite &= static_cast<int>(extremes[piece].finite);
    }
    for (int side = 0; side < kSides; ++side) maxima[side][group] = most[side];
  }
  finite[threadIdx.x] = all_finite;
  __syncthreads();
  if (threadIdx.x < kSides) {
    const int side = threadIdx.x;
    Bits<A> least = maxima[side][0];
    for (int group = 1; group < groups; ++group) least = maxima[side][group] < least ? maxima[side][group] : least;
    selection->bound[side] = groups < rank ? 0 : least;
    selection->prefix[side] = rank == 1 ? least : 0;
    selection->rank[side] = rank;
  }
  if (threadIdx.x == kSides) {
    int all = 1;
    for (int i = 0; i < kThreads; ++i) all &= finite[i];
    selection->finite = all;
  }
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    for (int side = 0; side < kSides; ++side) selection->counts[side][bin] = 0;
  }
}

// Counts the values in question by their next digit.
template <typename T>
__global__ void __launch_bounds__(kThreads) count_digits(const T* x, int64_t n, int shift, Selection* selection) {
  using A = Acc<T>;
  AMCT_SHARED(counts, unsigned counts[kSides][kBins]);
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) counts[0][bin] = counts[1][bin] = 0;
  __syncthreads();
  Bits<A> bounds[kSides], prefixes[kSides];
  for (int side = 0; side < kSides; ++side) {
    bounds[side] = static_cast<Bits<A>>(selection->bound[side]);
    prefixes[side] = static_cast<Bits<A>>(selection->prefix[side]);
  }
  const Bits<A> settled = shift + kDigit >= static_cast<int>(sizeof(A)) * 8
                              ? Bits<A>{0}
                              : static_cast<Bits<A>>(~Bits<A>{0} << (shift + kDigit));
  // A block counts less than 2^32 values, whatever the size of the card.
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const A v = static_cast<A>(load<1>(x + i).v[0]);
    const int side = side_of(v);
    if (side < 0) continue;
    const Bits<A> size = magnitude(v);
    if (size < bounds[side] || (size & settled) != prefixes[side]) continue;
    atomicAdd(&counts[side][size >> shift & (kBins - 1)], 1u);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    for (int side = 0; side < kSides; ++side) {
      if (counts[side][bin] != 0) {
        atomicAdd(&selection->counts[side][bin], static_cast<unsigned long long>(counts[side][bin]));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) settle_digit(int shift, Selection* selection) {
  AMCT_SHARED(counts, unsigned long long counts[kSides][kBins]);
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    for (int side = 0; side < kSides; ++side) {
      counts[side][bin] = selection->counts[side][bin];
      selection->counts[side][bin] = 0;
    }
  }
  __syncthreads();
  if (threadIdx.x >= kSides) return;
  const int side = threadIdx.x;
  int64_t rank = selection->rank[side];
  if (rank == 0) return;
  int bin = kBins - 1;
  while (bin >= 0 && rank > static_cast<int64_t>(counts[side][bin])) rank -= static_cast<int64_t>(counts[side][bin--]);
  // Fewer values on this side than the rank asks for: zero is the extreme value.
  selection->rank[side] = bin < 0 ? 0 : rank;
  selection->prefix[side] = bin < 0 ? 0 : selection->prefix[side] | static_cast<uint64_t>(bin) << shift;
}

template <typename A>
struct Candidate {
  A scale, offset, end, lowest, highest;
};

template <typename A>
__device__ Candidate<A> candidate(const Selection& selection, int i, int num_bits, bool with_offset) {
  const auto codes = math::code_range(num_bits);
  const A lowest = static_cast<A>(codes.lowest), highest = static_cast<A>(codes.highest);
  const A largest = as<A>(static_cast<Bits<A>>(selection.prefix[0]));
  const A smallest = -as<A>(static_cast<Bits<A>>(selection.prefix[1]));
  const A ratio = static_cast<A>(math::kRatios[i]);
  if (with_offset) {
    const A end = ratio * largest;
    const auto affine = math::affine(end, smallest, num_bits);
    return {affine.scale, affine.offset, end, lowest, highest};
  }
  const A end = ratio * (largest > -smallest ? largest : -smallest);
  const A scale = end / (largest < -smallest ? -lowest : highest);
  return {scale < A(FLT_EPSILON) ? A(1) : scale, A(0), end, lowest, highest};
}

// Every thread tries one candidate on a part of the block's values, which all lanes read at once: no sums to join but
// at the end. Blocks take pieces that depend on the number of values alone.
template <typename T>
__global__ void __launch_bounds__(kThreads) losses(const T* x, int64_t n, int64_t piece, int num_bits, bool with_offset,
                                                   const Selection* selection, double* sums) {
  using A = Acc<T>;
  AMCT_SHARED(values, A values[kTile]);
  AMCT_SHARED(parts, double parts[kSplit][kSlots]);
  if (!selection->finite) return;
  const int slot = threadIdx.x % kSlots, part = threadIdx.x / kSlots;
  const auto range = candidate<A>(*selection, slot < kCandidates ? slot : 0, num_bits, with_offset);
  const auto scaled = Nearest<A, false>::of(range.scale, A(0), num_bits);
  const auto moved = Nearest<A, true>::of(range.scale, range.offset, num_bits);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * piece, end = begin + piece < n ? begin + piece : n;
  double sum = 0;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int count = static_cast<int>(end - tile < kTile ? end - tile : kTile);
    for (int i = threadIdx.x; i < count; i += kThreads) values[i] = static_cast<A>(load<1>(x + tile + i).v[0]);
    __syncthreads();
    if (with_offset) {
      for (int i = part; i < count; i += kSplit) {
        const A v = values[i], code = math::clamp(moved(v), range.lowest, range.highest);
        const A d = (code - range.offset) * range.scale - v;
        sum += static_cast<double>(d * d);
      }
    } else {
      for (int i = part; i < count; i += kSplit) {
        const A v = values[i], d = scaled(math::clamp(v, -range.end, range.end)) * range.scale - v;
        sum += static_cast<double>(d * d);
      }
    }
    __syncthreads();
  }
  parts[part][slot] = sum;
  __syncthreads();
  if (part != 0) return;
  for (int p = 1; p < kSplit; ++p) sum += parts[p][slot];
  sums[static_cast<int64_t>(blockIdx.x) * kSlots + slot] = sum;
}

// The first candidate with the smallest error.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    choose(const double* sums, int pieces, int num_bits, bool with_offset, const Selection* selection, A* scale,
           A* offset, A* clip_max, A* clip_min) {
  AMCT_SHARED(parts, double parts[kSplit][kSlots]);
  const int slot = threadIdx.x % kSlots, part = threadIdx.x / kSlots;
  double sum = 0;
  if (selection->finite) {
#pragma unroll 8
    for (int i = part; i < pieces; i += kSplit) sum += sums[static_cast<int64_t>(i) * kSlots + slot];
  }
  parts[part][slot] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (!selection->finite) {
    *scale = *offset = *clip_max = *clip_min = static_cast<A>(NAN);
    return;
  }
  int best = 0;
  double least = 0;
  for (int i = 0; i < kCandidates; ++i) {
    double loss = parts[0][i];
    for (int p = 1; p < kSplit; ++p) loss += parts[p][i];
    if (i == 0 || loss < least) {
      best = i;
      least = loss;
    }
  }
  const auto range = candidate<A>(*selection, best, num_bits, with_offset);
  *scale = range.scale;
  *offset = range.offset;
  *clip_max = (range.highest - range.offset) * range.scale;
  *clip_min = (range.lowest - range.offset) * range.scale;
}

template <typename T>
void search(const Tensor& x, int num_bits, bool with_offset, Tensor (&results)[4]) {
  using A = Acc<T>;
  const int64_t n = x.numel(), rank = n - static_cast<int64_t>(kPercentile * static_cast<double>(n));
  const int64_t piece = ceil_div(std::max<int64_t>(ceil_div(n, kMostPieces), 4 * kTile), kTile) * kTile;
  const int64_t pieces = ceil_div(n, piece);
  const auto room = [&](int64_t bytes) { return at::empty({bytes}, x.options().dtype(at::kByte)); };
  const Tensor extremes_memory = room(pieces * static_cast<int64_t>(sizeof(Extremes<A>)));
  const Tensor selection_memory = room(sizeof(Selection));
  const Tensor sums_memory = room(pieces * kSlots * static_cast<int64_t>(sizeof(double)));
  auto* extremes = static_cast<Extremes<A>*>(extremes_memory.mutable_data_ptr());
  auto* selection = static_cast<Selection*>(selection_memory.mutable_data_ptr());
  auto* sums = static_cast<double*>(sums_memory.mutable_data_ptr());
  const T* data = static_cast<const T*>(x.const_data_ptr());

  launch(gather<T>, pieces, kThreads, data, n, piece, extremes);
  const int groups = static_cast<int>(std::min(pieces, rank));
  launch(bound<A>, 1, kThreads, extremes, static_cast<int>(pieces), rank, groups, selection);
  for (int shift = sizeof(A) * 8 - kDigit; rank > 1 && shift >= 0; shift -= kDigit) {
    launch(count_digits<T>, filling(ceil_div(n, kThreads * 8)), kThreads, data, n, shift, selection);
    launch(settle_digit, 1, kThreads, shift, selection);
  }
  launch(losses<T>, pieces, kThreads, data, n, piece, num_bits, with_offset, selection, sums);
  A* out[4];
  for (int i = 0; i < 4; ++i) out[i] = static_cast<A*>(results[i].mutable_data_ptr());
  launch(choose<A>, 1, kThreads, sums, static_cast<int>(pieces), num_bits, with_offset, selection, out[0], out[1],
         out[2], out[3]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> search_clip_range(const Tensor& x, int64_t num_bits, bool with_offset) {
  const char* op = "search_clip_range";
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  TORCH_CHECK_VALUE(x.numel() > 0, op, ": x must hold at least one value, shape ", x.sizes(), " has none");
  const c10::DeviceGuard guard(x.device());
  const Tensor source = dense(x);
  Tensor results[4];
  for (Tensor& result : results) result = at::empty({}, x.options().dtype(accumulate_type(x)));
  by_type(x.scalar_type(), [&]<typename T>() { search<T>(source, static_cast<int>(num_bits), with_offset, results); });
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) { m.impl("search_clip_range", search_clip_range); }

}  // namespace amct_ext::cuda
