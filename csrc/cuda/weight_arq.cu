// arq_fake_quantize, sparse_arq_fake_quantize and arq_fake_quantize_many: range and codes of a channel by one block, in
// one launch for any number of weights. A weight with few, long or scattered channels takes a reduction and a pass over
// it.
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "cuda/weight_arq.h"
#include "cuda/weight_quantize.cuh"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

struct Weight {
  const void* w;
  const bool* mask;
  void *y, *scale;
  AxisView view;
  int64_t first;  // block of its first channel
  bool packets;
};

// Travels as a kernel parameter (4 KiB at most): no copy to the device, so that a captured graph holds it.
template <int N>
struct Weights {
  Weight of[N];
  int count, num_bits;
};

constexpr int kAtOnce = 48;
static_assert(sizeof(Weights<kAtOnce>) < 4096);

template <int V, typename T>
__device__ __forceinline__ void quantize_channel(const Weight& weight, int64_t channel, int num_bits, Acc<T>* shared) {
  using A = Acc<T>;
  const T* w = static_cast<const T*>(weight.w);
  T* y = static_cast<T*>(weight.y);
  const AxisView view = weight.view;
  const int64_t size = view.outer * view.inner, step = static_cast<int64_t>(blockDim.x) * V;
  const auto at = [&](int64_t e) {
    const int64_t o = view.outer == 1 ? 0 : e / view.inner;
    return (o * view.size + channel) * view.inner + e - o * view.inner;
  };
  const Range<T> range{w, weight.mask, static_cast<A*>(weight.scale), num_bits};
  typename Range<T>::State state = Range<T>::identity();
#pragma unroll 4
  for (int64_t e = static_cast<int64_t>(threadIdx.x) * V; e < size; e += step) range.template add<V>({}, state, at(e));
  join_block<Range<T>>(state);
  if (threadIdx.x == 0) {
    range.finish(state, channel);
    *shared = range.scale[channel];
  }
  __syncthreads();
  const auto nearest = Nearest<A, false>::of(*shared, A(0), num_bits);
  const auto codes = math::code_range(num_bits);
  const A lowest = static_cast<A>(codes.lowest), highest = static_cast<A>(codes.highest);
#pragma unroll 2
  for (int64_t e = static_cast<int64_t>(threadIdx.x) * V; e < size; e += step) {
    const auto in = load_kept<V>(w, weight.mask, at(e));
    Packet<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k)
      put<T>(out.v[k], math::clamp(nearest(static_cast<A>(in.v[k])), lowest, highest), nearest.scale);
    store(y + at(e), out);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) quantize_channels(const __grid_constant__ Weights<N> weights) {
  AMCT_SHARED(scale, Acc<T> scale);
  int low = 0, high = weights.count - 1;  // the last weight that begins at or before this block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (weights.of[middle].first <= static_cast<int64_t>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Weight& weight = weights.of[low];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) - weight.first;
  if (weight.packets) {
    quantize_channel<kPacket<T>, T>(weight, channel, weights.num_bits, &scale);
  } else {
    quantize_channel<1, T>(weight, channel, weights.num_bits, &scale);
  }
}

// Whether a block per channel keeps the card busy and reads memory in order.
bool by_channels(const AxisView& view) {
  const int64_t size = view.outer * view.inner;
  return view.size > 1 && (view.outer == 1 || view.inner >= kWarp) && (size <= 16384 || view.size >= 128) &&
         (size >= kWarp || view.size <= 4096);
}

template <typename T>
Weight as_weight(const Tensor& source, const Tensor& mask, const Tensor& y, const Tensor& scale, const AxisView& view) {
  Weight weight{source.const_data_ptr(),
                mask.defined() ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr,
                y.mutable_data_ptr(),
                scale.mutable_data_ptr(),
                view,
                0,
                false};
  weight.packets = view.inner % kPacket<T> == 0 && aligned(weight.w, weight.mask, weight.y);
  return weight;
}

// Weights of one type, launched when full and at the end.
template <typename T, int N>
class Batch {
 public:
  explicit Batch(int num_bits) { weights_.num_bits = num_bits, weights_.count = 0; }

  void add(Weight weight) {
    if (weights_.count == N) run();
    weight.first = blocks_;
    blocks_ += weight.view.size;
    longest_ = std::max(longest_, ceil_div(weight.view.outer * weight.view.inner, weight.packets ? kPacket<T> : 1));
    weights_.of[weights_.count++] = weight;
  }

  void run() {
    launch(quantize_channels<T, N>, blocks_, threads_for(longest_), weights_);
    weights_.count = 0;
    blocks_ = longest_ = 0;
  }

 private:
  Weights<N> weights_;
  int64_t blocks_ = 0, longest_ = 0;
};

template <typename T>
void reduce_and_map(const Tensor& source, const Tensor& mask, const Tensor& y, const Tensor& scale,
                    const AxisView& view, int num_bits) {
  const Weight weight = as_weight<T>(source, mask, y, scale, view);
  const bool vector = aligned(weight.w, weight.mask, weight.y);
  const T* w = static_cast<const T*>(weight.w);
  const Range<T> range{w, weight.mask, static_cast<Acc<T>*>(weight.scale), num_bits};
  reduce<kPacket<T>>(range, view, vector, source.options());
  const Symmetric<T, T> quantize{
      w, weight.mask, static_cast<T*>(weight.y), value_of(scale), view, -static_cast<Acc<T>>(INFINITY), num_bits};
  map<kPacket<T>>(quantize, source.numel(), vector);
}

Tensor scales_for(const Tensor& w, std::optional<int64_t> axis) {
  return at::empty({axis ? w.size(*axis) : 1}, w.options().dtype(accumulate_type(w)));
}

std::tuple<Tensor, Tensor> arq(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis) {
  const char* op = "arq_fake_quantize";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w);
  Tensor y = at::empty_like(source), scale = scales_for(w, channel_axis);
  if (w.numel() == 0) return {std::move(y), scale.fill_(1)};
  range_and_quantize(source, {}, y, scale, static_cast<int>(num_bits), channel_axis);
  return {std::move(y), std::move(scale)};
}

std::tuple<Tensor, Tensor> sparse_arq(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                      std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  check_type(op, "mask", mask, at::kBool);
  check_same_shape(op, "mask", mask, "w", w);
  check_device(op, "mask", mask, "w", w);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), keep = match_mask_layout(mask, source);
  Tensor y = at::empty_like(source), scale = scales_for(w, channel_axis);
  if (w.numel() == 0) return {std::move(y), scale.fill_(1)};
  range_and_quantize(source, keep, y, scale, static_cast<int>(num_bits), channel_axis);
  return {std::move(y), std::move(scale)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_many(at::TensorList weights, int64_t num_bits,
                                                              at::IntArrayRef channel_axes) {
  const char* op = "arq_fake_quantize_many";
  check_bits(op, num_bits);
  TORCH_CHECK_VALUE(channel_axes.size() == weights.size(), op,
                    ": channel_axes must hold one axis (-1 for none) for each of ", weights.size(), " weights, not ",
                    channel_axes.size());
  const int bits = static_cast<int>(num_bits);
  std::vector<Tensor> sources, ys, scales;
  std::vector<AxisView> views;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_floating(op, "a weight", w);
    check_device(op, "a weight", w, "the others", weights[0]);
    std::optional<int64_t> axis;
    if (channel_axes[i] >= 0) axis = check_axis(op, "channel axis", w, channel_axes[i]);
    const c10::DeviceGuard guard(w.device());
    sources.push_back(dense(w));
    ys.push_back(at::empty_like(sources[i]));
    scales.push_back(scales_for(w, axis));
    views.push_back(axis_view(sources[i], axis));
  }
  if (weights.empty()) return {std::move(ys), std::move(scales)};
  const c10::DeviceGuard guard(weights[0].device());
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
    by_type(type, [&]<typename T>() {
      Batch<T, kAtOnce> batch(bits);
      for (size_t i = 0; i < sources.size(); ++i) {
        if (sources[i].scalar_type() != type) continue;
        if (sources[i].numel() == 0) {
          scales[i].fill_(1);
        } else if (by_channels(views[i])) {
          batch.add(as_weight<T>(sources[i], {}, ys[i], scales[i], views[i]));
        } else {
          reduce_and_map<T>(sources[i], {}, ys[i], scales[i], views[i], bits);
        }
      }
      batch.run();
    });
  }
  return {std::move(ys), std::move(scales)};
}

}  // namespace

void range_and_quantize(const Tensor& source, const Tensor& mask, const Tensor& y, const Tensor& scale, int num_bits,
                        std::optional<int64_t> channel_axis) {
  const AxisView view = axis_view(source, channel_axis);
  by_type(source.scalar_type(), [&]<typename T>() {
    if (by_channels(view)) {
      Batch<T, 1> batch(num_bits);
      batch.add(as_weight<T>(source, mask, y, scale, view));
      batch.run();
    } else {
      reduce_and_map<T>(source, mask, y, scale, view, num_bits);
    }
  });
}

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("arq_fake_quantize", arq);
  m.impl("sparse_arq_fake_quantize", sparse_arq);
  m.impl("arq_fake_quantize_many", arq_many);
}

}  // namespace amct_ext::cuda
