// shift_error_ and best_shift.
#include <torch/library.h>

#include "common/check.h"
#include "cuda/engine/map.cuh"
#include "cuda/engine/reduce.cuh"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

constexpr int kShifts = 16;

template <typename T>
struct ShiftErrors {
  struct State {
    double sums[kShifts];
  };

  struct Local {
    double scale;
  };

  const T* x;
  Value scales;
  bool one_scale;
  double* errors;  // a row per channel is added to
  int64_t row_stride, shift_stride;

  AMCT_INLINE static State identity() {
    State state;
    for (int s = 0; s < kShifts; ++s) state.sums[s] = 0;
    return state;
  }
  AMCT_INLINE static void join(State& into, const State& other) {
#pragma unroll
    for (int s = 0; s < kShifts; ++s) into.sums[s] += other.sums[s];
  }

  __device__ Local prepare(int64_t channel) const {
    const double scale = read(scales, one_scale ? 0 : channel);
    return {math::is_finite(scale) && scale > 0 ? scale : static_cast<double>(NAN)};
  }

  template <int V>
  __device__ void add(const Local& local, State& state, int64_t i) const {
    static_assert(V == 1);
    const double value = static_cast<double>(static_cast<Acc<T>>(load<1>(x + i).v[0]));
    const double total = math::clamp(math::round_even(value / local.scale), -2147483648.0, 2147483647.0);
    if (total != total) {
#pragma unroll
      for (int s = 0; s < kShifts; ++s) state.sums[s] = total;
      return;
    }
    // Whole numbers: shifted as such; the square of the difference is rounded once, as that of float64 is.
    const int64_t whole = static_cast<int64_t>(total);
#pragma unroll
    for (int s = 0; s < kShifts; ++s) {
      const int64_t floored = whole >> (s + 1);
      const int64_t kept = floored < -32768 ? -32768 : floored > 32767 ? 32767 : floored;
      const double difference = static_cast<double>(kept * (int64_t{2} << s) - whole);
      state.sums[s] += difference * difference;
    }
  }

  __device__ void finish(const State& state, int64_t channel) const {
#pragma unroll
    for (int s = 0; s < kShifts; ++s) errors[channel * row_stride + s * shift_stride] += state.sums[s];
  }
};

// Adds the rows of `batch` to a single one.
struct AddRows {
  const double* batch;
  int64_t rows;
  double* errors;
  int64_t shift_stride;

  __device__ int prepare() const { return 0; }
  __device__ bool wanted(int) const { return true; }
  template <int V>
  __device__ void run(int, int64_t s) const {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += batch[row * kShifts + s];
    errors[s * shift_stride] += sum;
  }
};

void shift_error(const Tensor& x, const Tensor& deq_scale, const Tensor& errors, int64_t channel_axis) {
  const char* op = "shift_error_";
  check_floating(op, "x", x);
  check_floating(op, "deq_scale", deq_scale);
  channel_axis = check_axis(op, "channel_axis", x, channel_axis);
  const int64_t channels = x.size(channel_axis);
  check_type(op, "errors", errors, at::kDouble);
  TORCH_CHECK_VALUE(deq_scale.numel() == 1 || deq_scale.numel() == channels, op, ": deq_scale must hold 1 or ",
                    channels, " values, not shape ", deq_scale.sizes());
  TORCH_CHECK_VALUE(
      errors.dim() == 2 && (errors.size(0) == channels || errors.size(0) == 1) && errors.size(1) == kShifts, op,
      ": errors must have shape (", channels, ", ", kShifts, ") or (1, ", kShifts, "), not ", errors.sizes());
  check_device(op, "deq_scale", deq_scale, "x", x);
  check_device(op, "errors", errors, "x", x);
  if (x.numel() == 0) return;
  const c10::DeviceGuard guard(x.device());
  const Tensor source = dense(x), scales = deq_scale.contiguous();
  const bool shared = errors.size(0) == 1 && channels > 1, one_scale = scales.numel() == 1;
  // One row and one scale: the channels do not matter.
  const AxisView view = shared && one_scale ? AxisView{1, 1, x.numel()} : axis_view(source, channel_axis);
  const bool rows = shared && !one_scale;
  Tensor batch;
  if (rows) batch = at::empty({channels, kShifts}, errors.options()).zero_();
  double* out = static_cast<double*>(errors.mutable_data_ptr());
  by_type(x.scalar_type(), [&]<typename T>() {
    const ShiftErrors<T> job{static_cast<const T*>(source.const_data_ptr()),
                             value_of(scales),
                             one_scale,
                             rows ? static_cast<double*>(batch.mutable_data_ptr()) : out,
                             rows ? kShifts : errors.stride(0),
                             rows ? 1 : errors.stride(1)};
    reduce<1>(job, view, false, x.options());  // sixteen sums a value: memory is not what takes the time
  });
  if (rows) {
    const AddRows job{static_cast<const double*>(batch.const_data_ptr()), channels, out, errors.stride(1)};
    launch(map_kernel<1, 1, AddRows>, 1, kWarp, job, int64_t{kShifts});
  }
}

struct Best {
  const double* errors;
  int32_t* best;

  __device__ int prepare() const { return 0; }
  __device__ bool wanted(int) const { return true; }
  template <int V>
  __device__ void run(int, int64_t row) const {
    const double* of = errors + row * kShifts;
    int32_t winner = 0;
    bool nan = of[0] != of[0];
    for (int32_t s = 1; s < kShifts; ++s) {
      nan = nan || of[s] != of[s];
      if (of[s] < of[winner]) winner = s;
    }
    best[row] = nan ? kShifts : winner + 1;
  }
};

Tensor best_shift(const Tensor& errors) {
  const char* op = "best_shift";
  check_type(op, "errors", errors, at::kDouble);
  TORCH_CHECK_VALUE(errors.dim() == 2 && errors.size(1) == kShifts, op, ": errors must have shape (channels, ", kShifts,
                    "), not ", errors.sizes());
  const c10::DeviceGuard guard(errors.device());
  const Tensor rows = errors.contiguous();
  Tensor best = at::empty({rows.size(0)}, rows.options().dtype(at::kInt));
  const Best job{static_cast<const double*>(rows.const_data_ptr()), static_cast<int32_t*>(best.mutable_data_ptr())};
  map_packets<1, 1>(job, rows.size(0));
  return best;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("shift_error_", shift_error);
  m.impl("best_shift", best_shift);
}

}  // namespace amct_ext::cuda
