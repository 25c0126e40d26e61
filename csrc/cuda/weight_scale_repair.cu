// repair_weight_scale_: sums of squares and range of each channel in one reduction, whose end writes the scale.
#include <torch/library.h>

#include "cuda/weight_range.cuh"
#include "ops/weight_check.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

template <typename T>
struct RepairScale {
  using A = Acc<T>;
  using Range = typename RangeScale<T>::State;

  struct State {
    double before, after;
    Range range;
  };

  struct Constants {
    A scale, inverse, lowest, highest;
  };

  const T* w;
  Scalars scale;
  int num_bits;

  AMCT_INLINE static State identity() { return {0, 0, RangeScale<T>::identity()}; }

  AMCT_INLINE static void combine(State& into, const State& other) {
    into.before += other.before;
    into.after += other.after;
    RangeScale<T>::combine(into.range, other.range);
  }

  __device__ double current(int64_t channel) const { return fetch_and_cast({scale.data, scale.type}, channel); }

  __device__ Constants prepare(int64_t channel) const {
    const A value = math::at_least(static_cast<A>(current(channel)), A(FLT_EPSILON));
    const auto codes = math::code_range(num_bits);
    return {value, A(1) / value, static_cast<A>(codes.lowest), static_cast<A>(codes.highest)};
  }

  template <int V>
  __device__ void accumulate(const Constants& constants, State& state, int64_t i) const {
    const auto in = load_vector<V>(w + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A v = static_cast<A>(in.val[k]);
      const A code = math::clamp(math::round_even(v * constants.inverse), constants.lowest, constants.highest);
      const double before = static_cast<double>(v), after = static_cast<double>(code * constants.scale);
      state.before += before * before;
      state.after += after * after;
      RangeScale<T>::accumulate_value(state.range, v);
    }
  }

  __device__ void finalize(const State& state, int64_t channel) const {
    if (!math::channel_is_lost(state.before, state.after)) return;
    cast_and_store(scale, math::repaired_scale(state.range.max, state.range.min, num_bits, current(channel)), channel);
  }
};

void repair_weight_scale(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  channel_axis = check_scaled_weight("repair_weight_scale_", w, scale, num_bits, channel_axis, 8);
  if (w.numel() == 0) return;
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), written = scale.contiguous();
  dispatch_floating(w.scalar_type(), [&]<typename T>() {
    const RepairScale<T> job{static_cast<const T*>(source.const_data_ptr()), scalars(written),
                             static_cast<int>(num_bits)};
    reduce<kVecSize<T>>(job, axis_view(source, channel_axis), vector_aligned(job.w), w.options());
  });
  if (!written.is_same(scale)) scale.copy_(written);
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) { m.impl("repair_weight_scale_", repair_weight_scale); }

}  // namespace amct_ext::cuda
