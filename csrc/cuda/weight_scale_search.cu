// search_weight_scale: the range of each channel, one pass that sums how well the codes of all scales tried fit, the
// choice. Nothing is read on the host.
#include <torch/library.h>

#include "cuda/weight_arq.h"
#include "cuda/weight_range.cuh"
#include "ops/sparsity_check.h"
#include "ops/weight_check.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;
using math::kScaleFactors;

static_assert(kScaleFactors == kWarpSize);                 // a thread of a warp for each scale
constexpr int kTileItems = 1024;                           // weights in shared memory at a time
constexpr int kTileParts = kBlockThreads / kScaleFactors;  // parts of a tile, each read by a warp
constexpr int64_t kFitChunk = 16 * kTileItems;             // weights of a channel that one block reads

// The choice for a channel, by one thread: `sums` as of math::best_scale.
template <typename A>
__device__ void choose(const double* sums, A* scale) {
  *scale = static_cast<A>(math::best_scale(sums, static_cast<double>(*scale)));
}

// Each thread sums the products and squares of one scale over a part of each tile; the lanes of a warp read the same
// weight, a broadcast from shared memory. Block c * splits + s reads the s-th chunk of channel c. A chunk depends on
// the shape alone, so the sums have the same bits on every device.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads) scale_fits(const T* w, const bool* mask, AxisView view, int64_t splits,
                                                            int num_bits, Acc<T>* scale, double* partial) {
  using A = Acc<T>;
  AMCT_SHARED(values, A values[kTileItems]);
  AMCT_SHARED(part_sums, double part_sums[kTileParts][2 * kScaleFactors]);
  const int64_t channel = blockIdx.x / splits, split = blockIdx.x % splits, size = view.outer * view.inner;
  const A range_scale = scale[channel];
  if (!math::is_finite(range_scale)) return;
  const int index = threadIdx.x % kScaleFactors, part = threadIdx.x / kScaleFactors;
  const auto codes = math::code_range(num_bits);
  const A lowest = static_cast<A>(codes.lowest), highest = static_cast<A>(codes.highest);
  const A inverse = A(1) / (range_scale * static_cast<A>(math::scale_factor(index)));
  const int64_t begin = split * kFitChunk, end = begin + kFitChunk < size ? begin + kFitChunk : size;
  double products = 0, squares = 0;
  for (int64_t tile = begin; tile < end; tile += kTileItems) {
    const int count = static_cast<int>(end - tile < kTileItems ? end - tile : kTileItems);
    for (int i = threadIdx.x; i < count; i += kBlockThreads) {
      values[i] = static_cast<A>(load_masked<1>(w, mask, element_index(view, channel, tile + i)).val[0]);
    }
    __syncthreads();
    for (int i = part; i < count; i += kTileParts) {
      const A v = values[i], code = math::clamp(math::round_even(v * inverse), lowest, highest);
      products += static_cast<double>(v * code);
      squares += static_cast<double>(code * code);
    }
    __syncthreads();
  }
  part_sums[part][2 * index] = products;
  part_sums[part][2 * index + 1] = squares;
  __syncthreads();
  double* sums = splits == 1 ? part_sums[0] : partial + static_cast<int64_t>(blockIdx.x) * 2 * kScaleFactors;
  if (part == 0) {
    for (int p = 1; p < kTileParts; ++p) {
      products += part_sums[p][2 * index];
      squares += part_sums[p][2 * index + 1];
    }
    sums[2 * index] = products;
    sums[2 * index + 1] = squares;
  }
  if (splits > 1) return;
  __syncthreads();
  if (threadIdx.x == 0) choose(sums, scale + channel);
}

// The chunks of a channel, added up in order, and the choice; a warp per channel.
template <typename A>
__global__ void __launch_bounds__(kWarpSize) choose_scales(const double* partial, int64_t splits, A* scale) {
  AMCT_SHARED(sums, double sums[2 * kScaleFactors]);
  const int64_t channel = blockIdx.x;
  if (!math::is_finite(scale[channel])) return;
  const double* from = partial + channel * splits * 2 * kScaleFactors;
  for (int i = threadIdx.x; i < 2 * kScaleFactors; i += kWarpSize) {
    double sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += from[s * 2 * kScaleFactors + i];
    sums[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) choose(sums, scale + channel);
}

template <typename T>
void search(const Tensor& w, const bool* mask, const Tensor& scale, const AxisView& view, int num_bits) {
  using A = Acc<T>;
  A* scales = static_cast<A*>(scale.mutable_data_ptr());
  const T* data = static_cast<const T*>(w.const_data_ptr());
  reduce<kVecSize<T>>(RangeScale<T>{data, mask, scales, num_bits}, view, vector_aligned(data, mask), w.options());
  const int64_t splits = ceil_div(view.outer * view.inner, kFitChunk), blocks = view.size * splits;
  Tensor memory;
  double* partial = nullptr;
  if (splits > 1) {
    memory = at::empty({blocks * 2 * kScaleFactors}, w.options().dtype(at::kDouble));
    partial = static_cast<double*>(memory.mutable_data_ptr());
  }
  launch(scale_fits<T>, blocks, kBlockThreads, data, mask, view, splits, num_bits, scales, partial);
  if (splits > 1) launch(choose_scales<A>, view.size, kWarpSize, partial, splits, scales);
}

Tensor search_weight_scale(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis,
                           const std::optional<Tensor>& mask) {
  const char* op = "search_weight_scale";
  channel_axis = check_weight(op, w, num_bits, channel_axis, 8);
  if (mask) check_mask(op, *mask, w);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), keep = mask ? match_mask_layout(*mask, source) : Tensor();
  Tensor scale = empty_scales(w, channel_axis);
  if (w.numel() == 0) return scale.fill_(1);
  dispatch_floating(w.scalar_type(), [&]<typename T>() {
    search<T>(source, mask ? static_cast<const bool*>(keep.const_data_ptr()) : nullptr, scale,
              axis_view(source, channel_axis), static_cast<int>(num_bits));
  });
  return scale;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) { m.impl("search_weight_scale", search_weight_scale); }

}  // namespace amct_ext::cuda
