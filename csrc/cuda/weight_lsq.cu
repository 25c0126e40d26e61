// lsq_fake_quantize and its backward, quantize_weight, filter_norms.
#include <torch/library.h>

#include <cmath>

#include "common/check.h"
#include "cuda/weight_quantize.cuh"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

std::optional<int64_t> check_learned(const char* op, const Tensor& w, const Tensor& scale, int64_t num_bits,
                                     std::optional<int64_t> axis, int64_t most = 16) {
  check_floating(op, "w", w);
  check_bits(op, num_bits, most);
  if (axis) axis = check_axis(op, "channel_axis", w, *axis);
  check_floating(op, "scale", scale);
  check_scale(op, scale, w, axis);
  check_device(op, "scale", scale, "w", w);
  return axis;
}

template <typename T, typename Out>
void quantize(const Tensor& source, const Tensor& y, const Tensor& scale, std::optional<int64_t> axis, int num_bits) {
  const Symmetric<T, Out> job{static_cast<const T*>(source.const_data_ptr()),
                              nullptr,
                              static_cast<Out*>(y.mutable_data_ptr()),
                              value_of(scale),
                              axis_view(source, axis),
                              Acc<T>(FLT_EPSILON),
                              num_bits};
  map<kPacket<T>>(job, source.numel(), aligned(job.w, job.y));
}

Tensor lsq_forward(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
                   std::optional<double>) {
  channel_axis = check_learned("lsq_fake_quantize", w, scale, num_bits, channel_axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), scales = scale.contiguous();
  Tensor y = at::empty_like(source);
  if (w.numel() == 0) return y;
  by_type(w.scalar_type(),
          [&]<typename T>() { quantize<T, T>(source, y, scales, channel_axis, static_cast<int>(num_bits)); });
  return y;
}

Tensor quantize_weight(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  channel_axis = check_learned("quantize_weight", w, scale, num_bits, channel_axis, 8);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), scales = scale.contiguous();
  Tensor y = at::empty_like(source, source.options().dtype(at::kChar));
  if (w.numel() == 0) return y;
  by_type(w.scalar_type(),
          [&]<typename T>() { quantize<T, int8_t>(source, y, scales, channel_axis, static_cast<int>(num_bits)); });
  return y;
}

struct Sum {
  struct State {
    double sum;
  };
  AMCT_INLINE static State identity() { return {0}; }
  AMCT_INLINE static void join(State& into, const State& other) { into.sum += other.sum; }
};

template <typename T>
struct ScaleGradient : Sum {
  using A = Acc<T>;

  struct Local {
    A scale, lowest, highest, bottom, top;
  };

  const T *grad, *w;
  Value scale;
  Result d_scale;
  double factor;
  int num_bits;

  __device__ Local prepare(int64_t channel) const {
    const A value = math::at_least(static_cast<A>(read(scale, channel)), A(FLT_EPSILON));
    const auto range = math::code_range(num_bits);
    const A lowest = static_cast<A>(range.lowest), highest = static_cast<A>(range.highest);
    return {value, lowest, highest, lowest * value, highest * value};
  }

  template <int V>
  __device__ void add(const Local& local, State& state, int64_t i) const {
    const auto in = load<V>(w + i);
    const auto upstream = load<V>(grad + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A v = static_cast<A>(in.v[k]), z = v / local.scale;
      const A slope = v < local.bottom ? local.lowest : v > local.top ? local.highest : math::round_even(z) - z;
      state.sum += static_cast<double>(slope * static_cast<A>(upstream.v[k]));
    }
  }

  __device__ void finish(const State& state, int64_t channel) const { write(d_scale, state.sum * factor, channel); }
};

Tensor lsq_backward(const Tensor& grad, const Tensor& w, const Tensor& scale, int64_t num_bits,
                    std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  const char* op = "lsq_fake_quantize_backward";
  channel_axis = check_learned(op, w, scale, num_bits, channel_axis);
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
  by_type(type, [&]<typename T>() {
    ScaleGradient<T> job;
    job.grad = static_cast<const T*>(upstream.const_data_ptr());
    job.w = static_cast<const T*>(source.const_data_ptr());
    job.scale = value_of(scales);
    job.d_scale = result_of(d_scale);
    job.factor = factor;
    job.num_bits = static_cast<int>(num_bits);
    reduce<kPacket<T>>(job, axis_view(source, channel_axis), aligned(job.grad, job.w), w.options());
  });
  return d_scale;
}

template <typename T>
struct Norm : Sum {
  struct Local {};

  const T* w;
  Acc<T>* norm;

  __device__ Local prepare(int64_t) const { return {}; }

  template <int V>
  __device__ void add(const Local&, State& state, int64_t i) const {
    const auto in = load<V>(w + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const double v = static_cast<double>(static_cast<Acc<T>>(in.v[k]));
      state.sum += v * v;
    }
  }

  __device__ void finish(const State& state, int64_t channel) const {
    norm[channel] = static_cast<Acc<T>>(::sqrt(state.sum));
  }
};

Tensor filter_norms(const Tensor& w, int64_t axis) {
  const char* op = "filter_norms";
  check_floating(op, "w", w);
  axis = check_axis(op, "axis", w, axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w);
  Tensor norms = at::empty({w.size(axis)}, w.options().dtype(accumulate_type(w)));
  by_type(w.scalar_type(), [&]<typename T>() {
    Norm<T> job;
    job.w = static_cast<const T*>(source.const_data_ptr());
    job.norm = static_cast<Acc<T>*>(norms.mutable_data_ptr());
    reduce<kPacket<T>>(job, axis_view(source, axis), aligned(job.w), w.options());
  });
  return norms;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("lsq_fake_quantize", lsq_forward);
  m.impl("lsq_fake_quantize_backward", lsq_backward);
  m.impl("quantize_weight", quantize_weight);
  m.impl("filter_norms", filter_norms);
}

}  // namespace amct_ext::cuda
