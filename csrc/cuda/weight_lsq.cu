// lsq_fake_quantize and the gradient of its scales.
#include <torch/library.h>

#include <cmath>

#include "cuda/weight_quantize.cuh"
#include "ops/weight_check.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

Tensor lsq_fake_quantize(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
                         std::optional<double>) {
  channel_axis = check_scaled_weight("lsq_fake_quantize", w, scale, num_bits, channel_axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), scales = scale.contiguous();
  Tensor y = at::empty_like(source);
  if (w.numel() == 0) return y;
  dispatch_floating(w.scalar_type(), [&]<typename T>() {
    launch_quantize<T, T>(source, nullptr, y, scales, axis_view(source, channel_axis), Acc<T>(FLT_EPSILON),
                          static_cast<int>(num_bits));
  });
  return y;
}

// The gradient of a channel's scale; that of the weight passes straight through and is not computed here.
template <typename T>
struct ScaleGradient : SumReduction {
  using A = Acc<T>;

  struct Constants {
    A scale, lowest, highest;
    A lower, upper;  // weights outside saturate
  };

  const T *grad, *w;
  ConstScalars scale;
  Scalars d_scale;
  double factor;
  int num_bits;

  __device__ Constants prepare(int64_t channel) const {
    const A value = math::at_least(static_cast<A>(fetch_and_cast(scale, channel)), A(FLT_EPSILON));
    const auto range = math::code_range(num_bits);
    const A lowest = static_cast<A>(range.lowest), highest = static_cast<A>(range.highest);
    return {value, lowest, highest, lowest * value, highest * value};
  }

  template <int V>
  __device__ void accumulate(const Constants& constants, State& state, int64_t i) const {
    const auto in = load_vector<V>(w + i);
    const auto upstream = load_vector<V>(grad + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A v = static_cast<A>(in.val[k]), z = v / constants.scale;
      const A slope = v < constants.lower   ? constants.lowest
                      : v > constants.upper ? constants.highest
                                            : math::round_even(z) - z;
      state.sum += static_cast<double>(slope * static_cast<A>(upstream.val[k]));
    }
  }

  __device__ void finalize(const State& state, int64_t channel) const {
    cast_and_store(d_scale, state.sum * factor, channel);
  }
};

Tensor lsq_fake_quantize_backward(const Tensor& grad, const Tensor& w, const Tensor& scale, int64_t num_bits,
                                  std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  const char* op = "lsq_fake_quantize_backward";
  channel_axis = check_scaled_weight(op, w, scale, num_bits, channel_axis);
  check_floating(op, "grad", grad);
  check_same_shape(op, "grad", grad, "w", w);
  check_device(op, "grad", grad, "w", w);
  const c10::DeviceGuard guard(w.device());
  const at::ScalarType type = common_type(grad, w);
  const Tensor source = to_type(dense(w), type), upstream = match_layout(grad, source), scales = scale.contiguous();
  Tensor d_scale = at::empty(scale.sizes(), scale.options());
  const int64_t weights = scale.numel() ? std::max<int64_t>(w.numel() / scale.numel(), 1) : 1;
  const double highest = math::code_range(static_cast<int>(num_bits)).highest;
  const double factor = grad_factor.value_or(1.0 / std::sqrt(static_cast<double>(weights) * highest));
  dispatch_floating(type, [&]<typename T>() {
    ScaleGradient<T> job;
    job.grad = static_cast<const T*>(upstream.const_data_ptr());
    job.w = static_cast<const T*>(source.const_data_ptr());
    job.scale = const_scalars(scales);
    job.d_scale = scalars(d_scale);
    job.factor = factor;
    job.num_bits = static_cast<int>(num_bits);
    reduce<kVecSize<T>>(job, axis_view(source, channel_axis), vector_aligned(job.grad, job.w), w.options());
  });
  return d_scale;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("lsq_fake_quantize", lsq_fake_quantize);
  m.impl("lsq_fake_quantize_backward", lsq_fake_quantize_backward);
}

}  // namespace amct_ext::cuda
