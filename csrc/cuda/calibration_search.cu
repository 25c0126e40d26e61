// search_clip_range, without a read on the host: the extreme values by radix select, one pass that sums the squared
// errors of all candidate ranges, the argmin.
#include <torch/library.h>

#include <tuple>

#include "common/check.h"
#include "cuda/calibration_radix_select.cuh"
#include "cuda/engine/round.cuh"

namespace amct_ext::cuda {
namespace {

using at::Tensor;
using math::kCandidates;

constexpr double kPercentile = 0.999999;
constexpr int kTileItems = 1024;                               // values in shared memory at a time
constexpr int kPaddedCandidates = 64;                          // threads that share one value
constexpr int kTileParts = kBlockThreads / kPaddedCandidates;  // parts of a tile, each read by so many threads

// One of the ranges that are tried. `end` bounds a symmetric range; offset and code range describe an asymmetric one.
template <typename A>
struct Candidate {
  A scale, offset, end, lowest, highest;
};

template <typename A>
__device__ Candidate<A> candidate(const RadixSelection& selection, int i, int num_bits, bool with_offset) {
  const auto codes = math::code_range(num_bits);
  const A lowest = static_cast<A>(codes.lowest), highest = static_cast<A>(codes.highest);
  const A largest = bit_cast<A>(static_cast<Bits<A>>(selection.prefix[0]));
  const A smallest = -bit_cast<A>(static_cast<Bits<A>>(selection.prefix[1]));
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

// Each thread sums the squared errors of one candidate over a part of each tile; the lanes of a warp read the same
// value, a broadcast from shared memory. A block's chunk depends on n alone, so the sums have the same bits on every
// device.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    losses(const T* x, int64_t n, int64_t chunk, int num_bits, bool with_offset, const RadixSelection* selection,
           double* sums) {
  using A = Acc<T>;
  AMCT_SHARED(values, A values[kTileItems]);
  AMCT_SHARED(part_sums, double part_sums[kTileParts][kPaddedCandidates]);
  if (!selection->finite) return;
  const int index = threadIdx.x % kPaddedCandidates, part = threadIdx.x / kPaddedCandidates;
  const auto range = candidate<A>(*selection, index < kCandidates ? index : 0, num_bits, with_offset);
  const auto symmetric = RoundedQuotient<A, false>::of(range.scale, A(0), num_bits);
  const auto asymmetric = RoundedQuotient<A, true>::of(range.scale, range.offset, num_bits);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * chunk, end = begin + chunk < n ? begin + chunk : n;
  double sum = 0;
  for (int64_t tile = begin; tile < end; tile += kTileItems) {
    const int count = static_cast<int>(end - tile < kTileItems ? end - tile : kTileItems);
    for (int i = threadIdx.x; i < count; i += kBlockThreads) values[i] = static_cast<A>(load_scalar(x + tile + i));
    __syncthreads();
    if (with_offset) {
      for (int i = part; i < count; i += kTileParts) {
        const A v = values[i], code = math::clamp(asymmetric(v), range.lowest, range.highest);
        const A d = (code - range.offset) * range.scale - v;
        sum += static_cast<double>(d * d);
      }
    } else {
      for (int i = part; i < count; i += kTileParts) {
        const A v = values[i], d = symmetric(math::clamp(v, -range.end, range.end)) * range.scale - v;
        sum += static_cast<double>(d * d);
      }
    }
    __syncthreads();
  }
  part_sums[part][index] = sum;
  __syncthreads();
  if (part != 0) return;
  for (int p = 1; p < kTileParts; ++p) sum += part_sums[p][index];
  sums[static_cast<int64_t>(blockIdx.x) * kPaddedCandidates + index] = sum;
}

// The first candidate with the smallest loss.
template <typename A>
__global__ void __launch_bounds__(kBlockThreads)
    argmin_loss(const double* sums, int chunks, int num_bits, bool with_offset, const RadixSelection* selection,
                A* scale, A* offset, A* clip_max, A* clip_min) {
  AMCT_SHARED(part_sums, double part_sums[kTileParts][kPaddedCandidates]);
  const int index = threadIdx.x % kPaddedCandidates, part = threadIdx.x / kPaddedCandidates;
  double sum = 0;
  if (selection->finite) {
#pragma unroll 8
    for (int i = part; i < chunks; i += kTileParts) sum += sums[static_cast<int64_t>(i) * kPaddedCandidates + index];
  }
  part_sums[part][index] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (!selection->finite) {
    *scale = *offset = *clip_max = *clip_min = static_cast<A>(NAN);
    return;
  }
  int best = 0;
  double least = 0;
  for (int i = 0; i < kCandidates; ++i) {
    double loss = part_sums[0][i];
    for (int p = 1; p < kTileParts; ++p) loss += part_sums[p][i];
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
  const int64_t min_chunk = std::max<int64_t>(ceil_div(n, kMaxChunks), 4 * kTileItems);
  const int64_t chunk = ceil_div(min_chunk, kTileItems) * kTileItems, chunks = ceil_div(n, chunk);
  const auto allocate = [&](int64_t bytes) { return at::empty({bytes}, x.options().dtype(at::kByte)); };
  const Tensor extremes_memory = allocate(chunks * static_cast<int64_t>(sizeof(Extremes<A>)));
  const Tensor selection_memory = allocate(sizeof(RadixSelection));
  const Tensor sums_memory = allocate(chunks * kPaddedCandidates * static_cast<int64_t>(sizeof(double)));
  auto* selection = static_cast<RadixSelection*>(selection_memory.mutable_data_ptr());
  auto* sums = static_cast<double*>(sums_memory.mutable_data_ptr());
  const T* data = static_cast<const T*>(x.const_data_ptr());

  radix_select(data, n, rank, chunk, chunks, static_cast<Extremes<A>*>(extremes_memory.mutable_data_ptr()), selection);
  launch(losses<T>, chunks, kBlockThreads, data, n, chunk, num_bits, with_offset, selection, sums);
  A* out[4];
  for (int i = 0; i < 4; ++i) out[i] = static_cast<A*>(results[i].mutable_data_ptr());
  launch(argmin_loss<A>, 1, kBlockThreads, sums, static_cast<int>(chunks), num_bits, with_offset, selection, out[0],
         out[1], out[2], out[3]);
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
  dispatch_floating(x.scalar_type(),
                    [&]<typename T>() { search<T>(source, static_cast<int>(num_bits), with_offset, results); });
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) { m.impl("search_clip_range", search_clip_range); }

}  // namespace amct_ext::cuda
