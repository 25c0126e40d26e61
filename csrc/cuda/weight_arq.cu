// arq_fake_quantize and arq_fake_quantize_many. A block takes the range of a channel and quantises it, one launch for
// any number of weights. Weights with few, long or scattered channels take a reduction and an elementwise pass instead.
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cuda/weight_arq.h"
#include "cuda/weight_quantize.cuh"
#include "ops/weight_check.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

struct WeightMetadata {
  const void* w;
  const bool* mask;
  void *y, *scale;
  AxisView view;
  int64_t first_block;  // block c of these takes channel c
  bool vectorized;
};

// Passed as a kernel parameter, which may take 4 KiB: nothing is copied to the device, so a captured graph contains it.
template <int N>
struct WeightListMetadata {
  WeightMetadata weights[N];
  int count, num_bits;
};

constexpr int kMaxWeightsPerLaunch = 48;
static_assert(sizeof(WeightListMetadata<kMaxWeightsPerLaunch>) < 4096);

// By one block: the range of the channel, then its codes times scale. The second read mostly hits the cache.
template <int V, typename T>
__device__ __forceinline__ void quantize_channel(const WeightMetadata& weight, int64_t channel, int num_bits,
                                                 Acc<T>* shared_scale) {
  using A = Acc<T>;
  const T* w = static_cast<const T*>(weight.w);
  T* y = static_cast<T*>(weight.y);
  const AxisView view = weight.view;
  const int64_t size = view.outer * view.inner, step = static_cast<int64_t>(blockDim.x) * V;
  const RangeScale<T> range{w, weight.mask, static_cast<A*>(weight.scale), num_bits};
  typename RangeScale<T>::State state = RangeScale<T>::identity();
#pragma unroll 4
  for (int64_t e = static_cast<int64_t>(threadIdx.x) * V; e < size; e += step) {
    range.template accumulate<V>({}, state, element_index(view, channel, e));
  }
  block_reduce<RangeScale<T>>(state);
  if (threadIdx.x == 0) {
    range.finalize(state, channel);
    *shared_scale = range.scale[channel];
  }
  __syncthreads();
  const auto quotient = RoundedQuotient<A, false>::of(*shared_scale, A(0), num_bits);
  const auto codes = math::code_range(num_bits);
  const A lowest = static_cast<A>(codes.lowest), highest = static_cast<A>(codes.highest);
#pragma unroll 2
  for (int64_t e = static_cast<int64_t>(threadIdx.x) * V; e < size; e += step) {
    const auto in = load_masked<V>(w, weight.mask, element_index(view, channel, e));
    AlignedVector<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      store_code(out.val[k], math::clamp(quotient(static_cast<A>(in.val[k])), lowest, highest), quotient.scale);
    }
    store_vector(y + element_index(view, channel, e), out);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kBlockThreads) quantize_channels(const __grid_constant__ WeightListMetadata<N> list) {
  AMCT_SHARED(shared_scale, Acc<T> shared_scale);
  // Binary search for this block's weight: the last one that begins at or before it.
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.weights[middle].first_block <= static_cast<int64_t>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const WeightMetadata& weight = list.weights[low];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) - weight.first_block;
  if (weight.vectorized) {
    quantize_channel<kVecSize<T>, T>(weight, channel, list.num_bits, &shared_scale);
  } else {
    quantize_channel<1, T>(weight, channel, list.num_bits, &shared_scale);
  }
}

constexpr int64_t kLongChannel = 16384;       // values; longer ones need other blocks beside theirs
constexpr int64_t kManyBlocks = 128;          // about one for each multiprocessor
constexpr int64_t kManyShortChannels = 4096;  // of less than a warp, whose blocks would be mostly idle

// Whether a block per channel fills the GPU, and each block reads memory in order.
bool use_block_per_channel(const AxisView& view) {
  const int64_t size = view.outer * view.inner;
  return view.size > 1 && (view.outer == 1 || view.inner >= kWarpSize) &&
         (size <= kLongChannel || view.size >= kManyBlocks) && (size >= kWarpSize || view.size <= kManyShortChannels);
}

const bool* mask_pointer(const Tensor& mask) {
  return mask.defined() ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr;
}

// Collects weights of one dtype and launches when it is full and on flush().
template <typename T, int N>
class WeightListLauncher {
 public:
  explicit WeightListLauncher(int num_bits) { list_.num_bits = num_bits, list_.count = 0; }

  void add(const Tensor& w, const Tensor& mask, const Tensor& y, const Tensor& scale, const AxisView& view) {
    if (list_.count == N) flush();
    WeightMetadata& weight = list_.weights[list_.count++];
    weight = {w.const_data_ptr(),  mask_pointer(mask), y.mutable_data_ptr(), scale.mutable_data_ptr(), view, blocks_,
              /*vectorized=*/false};
    weight.vectorized = view.inner % kVecSize<T> == 0 && vector_aligned(weight.w, weight.mask, weight.y);
    blocks_ += view.size;
    longest_ = std::max(longest_, ceil_div(view.outer * view.inner, weight.vectorized ? kVecSize<T> : 1));
  }

  void flush() {
    launch(quantize_channels<T, N>, blocks_, block_threads(longest_), list_);
    list_.count = 0;
    blocks_ = longest_ = 0;
  }

 private:
  WeightListMetadata<N> list_;
  int64_t blocks_ = 0, longest_ = 0;  // longest_: vectors of the longest channel
};

template <typename T>
void reduce_and_quantize(const Tensor& w, const Tensor& mask, const Tensor& y, const Tensor& scale,
                         const AxisView& view, int num_bits) {
  const RangeScale<T> range{static_cast<const T*>(w.const_data_ptr()), mask_pointer(mask),
                            static_cast<Acc<T>*>(scale.mutable_data_ptr()), num_bits};
  reduce<kVecSize<T>>(range, view, vector_aligned(range.w, range.mask, y.mutable_data_ptr()), w.options());
  launch_quantize<T, T>(w, range.mask, y, scale, view, -static_cast<Acc<T>>(INFINITY), num_bits);
}

std::tuple<Tensor, Tensor> arq_fake_quantize(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis) {
  channel_axis = check_weight("arq_fake_quantize", w, num_bits, channel_axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w);
  Tensor y = at::empty_like(source), scale = empty_scales(w, channel_axis);
  if (w.numel() == 0) return {std::move(y), scale.fill_(1)};
  arq_quantize(source, {}, y, scale, static_cast<int>(num_bits), channel_axis);
  return {std::move(y), std::move(scale)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_fake_quantize_many(at::TensorList weights, int64_t num_bits,
                                                                            at::IntArrayRef channel_axes) {
  const auto axes = check_weights("arq_fake_quantize_many", weights, num_bits, channel_axes);
  const int bits = static_cast<int>(num_bits);
  std::vector<Tensor> sources, ys, scales;
  std::vector<AxisView> views;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const c10::DeviceGuard guard(w.device());
    sources.push_back(dense(w));
    ys.push_back(at::empty_like(sources[i]));
    scales.push_back(empty_scales(w, axes[i]));
    views.push_back(axis_view(sources[i], axes[i]));
  }
  if (weights.empty()) return {std::move(ys), std::move(scales)};
  const c10::DeviceGuard guard(weights[0].device());
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
    dispatch_floating(type, [&]<typename T>() {
      WeightListLauncher<T, kMaxWeightsPerLaunch> launcher(bits);
      for (size_t i = 0; i < sources.size(); ++i) {
        if (sources[i].scalar_type() != type) continue;
        if (sources[i].numel() == 0) {
          scales[i].fill_(1);
        } else if (use_block_per_channel(views[i])) {
          launcher.add(sources[i], {}, ys[i], scales[i], views[i]);
        } else {
          reduce_and_quantize<T>(sources[i], {}, ys[i], scales[i], views[i], bits);
        }
      }
      launcher.flush();
    });
  }
  return {std::move(ys), std::move(scales)};
}

}  // namespace

Tensor empty_scales(const Tensor& w, std::optional<int64_t> channel_axis) {
  return at::empty({channel_axis ? w.size(*channel_axis) : 1}, w.options().dtype(accumulate_type(w)));
}

void arq_quantize(const Tensor& source, const Tensor& mask, const Tensor& y, const Tensor& scale, int num_bits,
                  std::optional<int64_t> channel_axis) {
  const AxisView view = axis_view(source, channel_axis);
  dispatch_floating(source.scalar_type(), [&]<typename T>() {
    if (use_block_per_channel(view)) {
      WeightListLauncher<T, 1> launcher(num_bits);
      launcher.add(source, mask, y, scale, view);
      launcher.flush();
    } else {
      reduce_and_quantize<T>(source, mask, y, scale, view, num_bits);
    }
  });
}

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("arq_fake_quantize", arq_fake_quantize);
  m.impl("arq_fake_quantize_many", arq_fake_quantize_many);
}

}  // namespace amct_ext::cuda
