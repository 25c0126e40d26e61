// shift_error_ (a reduction to sixteen sums per channel) and best_shift (an argmin per row).
#include <torch/library.h>

#include "cuda/engine/map.cuh"
#include "cuda/engine/reduce.cuh"
#include "ops/calibration_check.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

using math::kShifts;

// Sums, for each shift, of the squared error that the shift makes on the accumulator x / scale.
template <typename T>
struct ShiftErrors {
  struct State {
    double sums[kShifts];
  };

  struct Constants {
    double scale;
  };

  const T* x;
  ConstScalars scales;
  bool one_scale;
  double* errors;  // += a row per channel
  int64_t row_stride, shift_stride;

  AMCT_INLINE static State identity() {
    State state;
    for (int s = 0; s < kShifts; ++s) state.sums[s] = 0;
    return state;
  }
  AMCT_INLINE static void combine(State& into, const State& other) {
#pragma unroll
    for (int s = 0; s < kShifts; ++s) into.sums[s] += other.sums[s];
  }

  __device__ Constants prepare(int64_t channel) const {
    const double scale = fetch_and_cast(scales, one_scale ? 0 : channel);
    return {math::is_finite(scale) && scale > 0 ? scale : static_cast<double>(NAN)};
  }

  template <int V>
  __device__ void accumulate(const Constants& constants, State& state, int64_t i) const {
    static_assert(V == 1);
    const double value = static_cast<double>(static_cast<Acc<T>>(load_scalar(x + i)));
    const double rounded = math::clamp(math::round_even(value / constants.scale), -2147483648.0, 2147483647.0);
    if (rounded != rounded) {
#pragma unroll
      for (int s = 0; s < kShifts; ++s) state.sums[s] = rounded;
      return;
    }
    // Differences are exact in int64, so each square is rounded once, as in the float64 reference.
    const int64_t accumulator = static_cast<int64_t>(rounded);
#pragma unroll
    for (int s = 0; s < kShifts; ++s) {
      const int64_t shifted = accumulator >> (s + 1);
      const int64_t saturated = shifted < -32768 ? -32768 : shifted > 32767 ? 32767 : shifted;
      const double difference = static_cast<double>(saturated * (int64_t{2} << s) - accumulator);
      state.sums[s] += difference * difference;
    }
  }

  __device__ void finalize(const State& state, int64_t channel) const {
#pragma unroll
    for (int s = 0; s < kShifts; ++s) errors[channel * row_stride + s * shift_stride] += state.sums[s];
  }
};

// errors += the sum of the rows.
struct SumRows {
  const double* per_channel;
  int64_t rows;
  double* errors;
  int64_t shift_stride;

  __device__ int prepare() const { return 0; }
  template <int V>
  __device__ void run(int, int64_t s) const {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += per_channel[row * kShifts + s];
    errors[s * shift_stride] += sum;
  }
};

void shift_error_(const Tensor& x, const Tensor& deq_scale, const Tensor& errors, int64_t channel_axis) {
  channel_axis = check_shift_error("shift_error_", x, deq_scale, errors, channel_axis);
  const int64_t channels = x.size(channel_axis);
  if (x.numel() == 0) return;
  const c10::DeviceGuard guard(x.device());
  const Tensor source = dense(x), scales = deq_scale.contiguous();
  const bool one_row = errors.size(0) == 1 && channels > 1, one_scale = scales.numel() == 1;
  // One row and one scale: a single reduction over the whole tensor.
  const AxisView view = one_row && one_scale ? AxisView{1, 1, x.numel()} : axis_view(source, channel_axis);
  // One row of sums over channels of different scales: the channels are reduced first, then added up.
  const bool sum_rows = one_row && !one_scale;
  Tensor per_channel;
  if (sum_rows) per_channel = at::empty({channels, kShifts}, errors.options()).zero_();
  double* out = static_cast<double*>(errors.mutable_data_ptr());
  dispatch_floating(x.scalar_type(), [&]<typename T>() {
    const ShiftErrors<T> job{static_cast<const T*>(source.const_data_ptr()),
                             const_scalars(scales),
                             one_scale,
                             sum_rows ? static_cast<double*>(per_channel.mutable_data_ptr()) : out,
                             sum_rows ? kShifts : errors.stride(0),
                             sum_rows ? 1 : errors.stride(1)};
    reduce<1>(job, view, false, x.options());  // bound by the sixteen sums per value, not by memory: no vectors
  });
  if (sum_rows) {
    const SumRows job{static_cast<const double*>(per_channel.const_data_ptr()), channels, out, errors.stride(1)};
    map_in_one_warp(job, int64_t{kShifts});
  }
}

// The first shift with the smallest error, 1 to 16; 16 where an error is NaN.
struct ArgminShift {
  const double* errors;
  int32_t* best;

  __device__ int prepare() const { return 0; }
  template <int V>
  __device__ void run(int, int64_t row) const {
    const double* losses = errors + row * kShifts;
    int32_t argmin = 0;
    bool nan = losses[0] != losses[0];
    for (int32_t s = 1; s < kShifts; ++s) {
      nan = nan || losses[s] != losses[s];
      if (losses[s] < losses[argmin]) argmin = s;
    }
    best[row] = nan ? kShifts : argmin + 1;
  }
};

Tensor best_shift(const Tensor& errors) {
  check_shift_errors("best_shift", errors);
  const c10::DeviceGuard guard(errors.device());
  const Tensor rows = errors.contiguous();
  Tensor best = at::empty({rows.size(0)}, rows.options().dtype(at::kInt));
  const ArgminShift job{static_cast<const double*>(rows.const_data_ptr()),
                        static_cast<int32_t*>(best.mutable_data_ptr())};
  launch_map<1, 1>(job, rows.size(0));
  return best;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("shift_error_", shift_error_);
  m.impl("best_shift", best_shift);
}

}  // namespace amct_ext::cuda
