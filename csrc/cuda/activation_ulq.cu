// ulq_fake_quantize and its backward.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cuda/activation_ulq.h"
#include "cuda/engine/map.cuh"
#include "cuda/engine/reduce.cuh"
#include "cuda/engine/round.cuh"
#include "ops/activation_check.h"

namespace amct_ext::cuda {
namespace {

// Every thread works out scale and offset for itself: the clips are read on the device and no launch is spent on them.
template <typename T>
struct Forward {
  using A = Acc<T>;

  struct Local {
    Nearest<A, true> nearest;
    A lowest, highest;
  };

  const T* x;
  T* y;
  Value clip_max, clip_min, prev_clip_max, prev_clip_min;
  Result scale, offset, high, low;
  bool* invalid;
  int num_bits;
  bool fixed_min;

  __device__ Local prepare() const {
    A top = static_cast<A>(read(clip_max)), bottom = static_cast<A>(read(clip_min));
    math::effective_clips(top, bottom, static_cast<A>(read(prev_clip_max)), static_cast<A>(read(prev_clip_min)),
                          fixed_min);
    const auto affine = math::affine(top, bottom, num_bits);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      write(scale, affine.scale);
      write(offset, affine.offset);
      write(high, top);
      write(low, bottom);
      if (!(math::is_finite(affine.scale) && affine.scale > A(0))) raise(invalid);
    }
    const auto range = math::code_range(num_bits);
    return {Nearest<A, true>::of(affine.scale, affine.offset, num_bits), static_cast<A>(range.lowest),
            static_cast<A>(range.highest)};
  }

  __device__ bool wanted(const Local&) const { return true; }

  template <int V>
  __device__ void run(const Local& local, int64_t i) const {
    const auto in = load<V>(x + i);
    Packet<T, V> out;
    bool finite = true;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A v = static_cast<A>(in.v[k]);
      finite = finite && math::is_finite(v);
      const A code = math::clamp(local.nearest(v), local.lowest, local.highest);
      out.v[k] = static_cast<T>((code - local.nearest.offset) * local.nearest.scale);
    }
    store(y + i, out);
    if (!finite) raise(invalid);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_forward(const Tensor& x, const Tensor& clip_max,
                                                                       const Tensor& clip_min,
                                                                       const Tensor& prev_clip_max,
                                                                       const Tensor& prev_clip_min, int64_t num_bits,
                                                                       bool fixed_min) {
  const char* op = "ulq_fake_quantize";
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  check_clips(op, x, clip_max, clip_min, prev_clip_max, prev_clip_min);
  const c10::DeviceGuard guard(x.device());
  const Tensor source = dense(x);
  Tensor y = at::empty_like(source), invalid = at::empty({}, x.options().dtype(at::kBool));
  std::array<Tensor, 4> values;
  for (Tensor& value : values) value = at::empty({}, clip_max.options());
  clear(invalid.mutable_data_ptr(), 1);
  by_type(x.scalar_type(), [&]<typename T>() {
    const Forward<T> job{static_cast<const T*>(source.const_data_ptr()),
                         static_cast<T*>(y.mutable_data_ptr()),
                         value_of(clip_max),
                         value_of(clip_min),
                         value_of(prev_clip_max),
                         value_of(prev_clip_min),
                         result_of(values[0]),
                         result_of(values[1]),
                         result_of(values[2]),
                         result_of(values[3]),
                         static_cast<bool*>(invalid.mutable_data_ptr()),
                         static_cast<int>(num_bits),
                         fixed_min};
    map<kPacket<T>>(job, x.numel(), aligned(job.x, job.y));
  });
  return {std::move(y), values[0], values[1], values[2], values[3], std::move(invalid)};
}

namespace {

// G, the type of the gradient, is T, or double where T is float.
template <typename T, typename G>
struct Backward {
  using A = Acc<T>;

  struct State {
    double error, above, below;
  };

  struct Local {
    A scale, high, low;
    A upper, lower;  // x beyond these was clipped
  };

  const G* grad;
  const T* x;
  G* dx;
  Value clip_max, clip_min;
  Result d_clip_max, d_clip_min;
  int num_bits;

  AMCT_INLINE static State identity() { return {0, 0, 0}; }
  AMCT_INLINE static void join(State& into, const State& other) {
    into.error += other.error;
    into.above += other.above;
    into.below += other.below;
  }

  __device__ Local prepare(int64_t) const {
    const A high = static_cast<A>(read(clip_max)), low = static_cast<A>(read(clip_min));
    const auto affine = math::affine(high, low, num_bits);
    const auto range = math::code_range(num_bits);
    return {affine.scale, high, low, affine.scale * (static_cast<A>(range.highest) - affine.offset),
            affine.scale * (static_cast<A>(range.lowest) - affine.offset)};
  }

  template <int V>
  __device__ void add(const Local& local, State& state, int64_t i) const {
    const auto in = load<V>(x + i);
    const auto upstream = load<V>(grad + i);
    Packet<G, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A v = static_cast<A>(in.v[k]), g = static_cast<A>(upstream.v[k]);
      const bool above = v > local.upper, below = v < local.lower;
      const A z = (above ? local.high : below ? local.low : v) / local.scale;
      state.error += static_cast<double>((math::round_even(z) - z) * g);
      if (above) state.above += static_cast<double>(g);
      if (!above && below) state.below += static_cast<double>(g);
      out.v[k] = above || below ? G(0) : upstream.v[k];
    }
    store(dx + i, out);
  }

  __device__ void finish(const State& state, int64_t) const {
    const double error = state.error / static_cast<double>((1LL << num_bits) - 1);
    write(d_clip_max, error + state.above);
    write(d_clip_min, state.below - error);
  }
};

template <typename T, typename G>
void backward_as(const Tensor& grad, const Tensor& x, const Tensor& dx, const Tensor& clip_max, const Tensor& clip_min,
                 const Tensor& d_max, const Tensor& d_min, int num_bits) {
  const Backward<T, G> job{static_cast<const G*>(grad.const_data_ptr()),
                           static_cast<const T*>(x.const_data_ptr()),
                           static_cast<G*>(dx.mutable_data_ptr()),
                           value_of(clip_max),
                           value_of(clip_min),
                           result_of(d_max),
                           result_of(d_min),
                           num_bits};
  reduce<kPacket<T>, false>(job, {1, 1, x.numel()}, aligned(job.grad, job.x, job.dx), x.options());
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& clip_max,
                                            const Tensor& clip_min, int64_t num_bits) {
  check_ulq_backward("ulq_fake_quantize_backward", grad, x, clip_max, clip_min, num_bits);
  const c10::DeviceGuard guard(x.device());
  const at::ScalarType given = grad.scalar_type(), type = common_type(grad, x);
  const bool keeps = is_double(grad) && !is_double(x);
  const Tensor source = to_type(dense(x), type);
  const Tensor upstream = match_layout(grad, keeps ? at::empty_like(source, given) : source);
  Tensor dx = at::empty_like(upstream);
  Tensor d_max = at::empty({}, clip_max.options()), d_min = at::empty({}, clip_min.options());
  const int bits = static_cast<int>(num_bits);
  if (keeps) {
    backward_as<float, double>(upstream, source, dx, clip_max, clip_min, d_max, d_min, bits);
  } else {
    by_type(type,
            [&]<typename T>() { backward_as<T, T>(upstream, source, dx, clip_max, clip_min, d_max, d_min, bits); });
  }
  return {dx.to(given), std::move(d_max), std::move(d_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("ulq_fake_quantize", ulq_forward);
  m.impl("ulq_fake_quantize_backward", backward);
}

}  // namespace amct_ext::cuda
