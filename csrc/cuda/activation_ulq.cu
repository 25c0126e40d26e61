// ulq_fake_quantize and its backward: an elementwise kernel, a reduction that writes the input gradient on its way.
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

// Each thread reads the clips and computes scale and offset itself, so that the op is a single launch without a host
// sync. The first thread writes them out.
template <typename T>
struct UlqForward {
  using A = Acc<T>;

  struct Constants {
    RoundedQuotient<A, true> quotient;
    A lowest, highest;
  };

  const T* x;
  T* y;
  ConstScalars clip_max, clip_min, prev_clip_max, prev_clip_min;
  Scalars scale, offset, used_clip_max, used_clip_min;
  bool* invalid;
  int num_bits;
  bool fixed_min;

  __device__ Constants prepare() const {
    A high = static_cast<A>(fetch_and_cast(clip_max)), low = static_cast<A>(fetch_and_cast(clip_min));
    const A prev_high = static_cast<A>(fetch_and_cast(prev_clip_max)),
            prev_low = static_cast<A>(fetch_and_cast(prev_clip_min));
    math::effective_clips(high, low, prev_high, prev_low, fixed_min);
    const auto affine = math::affine(high, low, num_bits);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      cast_and_store(scale, affine.scale);
      cast_and_store(offset, affine.offset);
      cast_and_store(used_clip_max, high);
      cast_and_store(used_clip_min, low);
      if (!(math::is_finite(affine.scale) && affine.scale > A(0))) set_flag(invalid);
    }
    const auto range = math::code_range(num_bits);
    return {RoundedQuotient<A, true>::of(affine.scale, affine.offset, num_bits), static_cast<A>(range.lowest),
            static_cast<A>(range.highest)};
  }

  template <int V>
  __device__ void run(const Constants& constants, int64_t i) const {
    const auto in = load_vector<V>(x + i);
    AlignedVector<T, V> out;
    bool finite = true;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A v = static_cast<A>(in.val[k]);
      finite = finite && math::is_finite(v);
      const A code = math::clamp(constants.quotient(v), constants.lowest, constants.highest);
      out.val[k] = static_cast<T>((code - constants.quotient.offset) * constants.quotient.scale);
    }
    store_vector(y + i, out);
    if (!finite) set_flag(invalid);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_fake_quantize(const Tensor& x, const Tensor& clip_max,
                                                                             const Tensor& clip_min,
                                                                             const Tensor& prev_clip_max,
                                                                             const Tensor& prev_clip_min,
                                                                             int64_t num_bits, bool fixed_min) {
  const char* op = "ulq_fake_quantize";
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  check_clips(op, x, clip_max, clip_min, prev_clip_max, prev_clip_min);
  const c10::DeviceGuard guard(x.device());
  const Tensor source = dense(x);
  Tensor y = at::empty_like(source), invalid = at::empty({}, x.options().dtype(at::kBool));
  std::array<Tensor, 4> scalars_out;
  for (Tensor& scalar : scalars_out) scalar = at::empty({}, clip_max.options());
  memset_zero(invalid.mutable_data_ptr(), 1);
  dispatch_floating(x.scalar_type(), [&]<typename T>() {
    const UlqForward<T> job{static_cast<const T*>(source.const_data_ptr()),
                            static_cast<T*>(y.mutable_data_ptr()),
                            const_scalars(clip_max),
                            const_scalars(clip_min),
                            const_scalars(prev_clip_max),
                            const_scalars(prev_clip_min),
                            scalars(scalars_out[0]),
                            scalars(scalars_out[1]),
                            scalars(scalars_out[2]),
                            scalars(scalars_out[3]),
                            static_cast<bool*>(invalid.mutable_data_ptr()),
                            static_cast<int>(num_bits),
                            fixed_min};
    map<kVecSize<T>>(job, x.numel(), vector_aligned(job.x, job.y));
  });
  return {std::move(y), scalars_out[0], scalars_out[1], scalars_out[2], scalars_out[3], std::move(invalid)};
}

namespace {

// The gradient of x elementwise, those of the clips as sums in float64. G is the type of the gradient: T, or double
// where T is float.
template <typename T, typename G>
struct UlqBackward {
  using A = Acc<T>;

  struct State {
    double rounding_error, above, below;  // sums of gradients, the first weighted by the error of each code
  };

  struct Constants {
    A scale, high, low;
    A upper, lower;  // values outside were clipped
  };

  const G* grad;
  const T* x;
  G* dx;
  ConstScalars clip_max, clip_min;
  Scalars d_clip_max, d_clip_min;
  int num_bits;

  AMCT_INLINE static State identity() { return {0, 0, 0}; }
  AMCT_INLINE static void combine(State& into, const State& other) {
    into.rounding_error += other.rounding_error;
    into.above += other.above;
    into.below += other.below;
  }

  __device__ Constants prepare(int64_t) const {
    const A high = static_cast<A>(fetch_and_cast(clip_max)), low = static_cast<A>(fetch_and_cast(clip_min));
    const auto affine = math::affine(high, low, num_bits);
    const auto range = math::code_range(num_bits);
    return {affine.scale, high, low, affine.scale * (static_cast<A>(range.highest) - affine.offset),
            affine.scale * (static_cast<A>(range.lowest) - affine.offset)};
  }

  template <int V>
  __device__ void accumulate(const Constants& constants, State& state, int64_t i) const {
    const auto in = load_vector<V>(x + i);
    const auto upstream = load_vector<V>(grad + i);
    AlignedVector<G, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A v = static_cast<A>(in.val[k]), g = static_cast<A>(upstream.val[k]);
      const bool above = v > constants.upper, below = v < constants.lower;
      const A z = (above ? constants.high : below ? constants.low : v) / constants.scale;
      state.rounding_error += static_cast<double>((math::round_even(z) - z) * g);
      if (above) state.above += static_cast<double>(g);
      if (!above && below) state.below += static_cast<double>(g);
      out.val[k] = above || below ? G(0) : upstream.val[k];
    }
    store_vector(dx + i, out);
  }

  __device__ void finalize(const State& state, int64_t) const {
    const double error = state.rounding_error / static_cast<double>((1LL << num_bits) - 1);
    cast_and_store(d_clip_max, error + state.above);
    cast_and_store(d_clip_min, state.below - error);
  }
};

template <typename T, typename G>
void launch_backward(const Tensor& grad, const Tensor& x, const Tensor& dx, const Tensor& clip_max,
                     const Tensor& clip_min, const Tensor& d_max, const Tensor& d_min, int num_bits) {
  const UlqBackward<T, G> job{static_cast<const G*>(grad.const_data_ptr()),
                              static_cast<const T*>(x.const_data_ptr()),
                              static_cast<G*>(dx.mutable_data_ptr()),
                              const_scalars(clip_max),
                              const_scalars(clip_min),
                              scalars(d_max),
                              scalars(d_min),
                              num_bits};
  reduce<kVecSize<T>, false>(job, {1, 1, x.numel()}, vector_aligned(job.grad, job.x, job.dx), x.options());
}

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                              const Tensor& clip_max, const Tensor& clip_min,
                                                              int64_t num_bits) {
  check_ulq_backward("ulq_fake_quantize_backward", grad, x, clip_max, clip_min, num_bits);
  const c10::DeviceGuard guard(x.device());
  const at::ScalarType given = grad.scalar_type(), type = common_type(grad, x);
  const bool wide_grad = is_double(grad) && !is_double(x);  // the arithmetic is float32, dx stays float64
  const Tensor source = to_type(dense(x), type);
  const Tensor upstream = match_layout(grad, wide_grad ? at::empty_like(source, given) : source);
  Tensor dx = at::empty_like(upstream);
  Tensor d_max = at::empty({}, clip_max.options()), d_min = at::empty({}, clip_min.options());
  const int bits = static_cast<int>(num_bits);
  if (wide_grad) {
    launch_backward<float, double>(upstream, source, dx, clip_max, clip_min, d_max, d_min, bits);
  } else {
    dispatch_floating(type, [&]<typename T>() {
      launch_backward<T, T>(upstream, source, dx, clip_max, clip_min, d_max, d_min, bits);
    });
  }
  return {dx.to(given), std::move(d_max), std::move(d_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("ulq_fake_quantize", ulq_fake_quantize);
  m.impl("ulq_fake_quantize_backward", ulq_fake_quantize_backward);
}

}  // namespace amct_ext::cuda
