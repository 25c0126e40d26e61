// shift_error_ and best_shift.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/tensors.h"
#include "quant_math.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;
constexpr int64_t kShifts = 16;

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
  const Tensor source = without_holes(x), scales = deq_scale.contiguous();
  const Runs runs = runs_along(source, channel_axis);
  const auto loop = kernels().shift_errors[element_of(x)];
  const void* in = source.const_data_ptr();
  const size_t size = x.element_size();
  const auto scale_at = [&](int64_t channel) {
    const double v = value_at(scales, scales.numel() == 1 ? 0 : channel);
    return math::is_finite(v) && v > 0 ? v : std::nan("");
  };
  // One row of sums for a channel, or for a block where there is one channel: added in order afterwards.
  const int64_t n = source.numel();
  const bool blocks = runs.count == 1;
  const int64_t rows = blocks ? (n + kBlock - 1) / kBlock : runs.count;
  std::vector<double> sums(rows * kShifts, 0.0);
  if (blocks) {
    for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) {
      loop(at_element(in, begin, size), end - begin, scale_at(0), &sums[block * kShifts]);
    });
  } else {
    for_rows(runs.count, runs.outer * runs.inner * kShifts, [&](int64_t channel) {
      const double scale = scale_at(channel);
      for (int64_t o = 0; o < runs.outer; ++o) {
        loop(at_element(in, (o * runs.count + channel) * runs.inner, size), runs.inner, scale,
             &sums[channel * kShifts]);
      }
    });
  }
  const bool shared = errors.size(0) == 1;
  double* out = static_cast<double*>(errors.mutable_data_ptr());
  const int64_t row_stride = errors.stride(0), shift_stride = errors.stride(1);
  std::vector<double> batch(errors.size(0) * kShifts, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t s = 0; s < kShifts; ++s) batch[(shared ? 0 : row) * kShifts + s] += sums[row * kShifts + s];
  }
  for (int64_t row = 0; row < errors.size(0); ++row) {
    for (int64_t s = 0; s < kShifts; ++s) out[row * row_stride + s * shift_stride] += batch[row * kShifts + s];
  }
}

Tensor best_shift(const Tensor& errors) {
  const char* op = "best_shift";
  check_type(op, "errors", errors, at::kDouble);
  TORCH_CHECK_VALUE(errors.dim() == 2 && errors.size(1) == kShifts, op, ": errors must have shape (channels, ", kShifts,
                    "), not ", errors.sizes());
  const Tensor rows = errors.contiguous();
  Tensor best = at::empty({rows.size(0)}, rows.options().dtype(at::kInt));
  const double* in = static_cast<const double*>(rows.const_data_ptr());
  int32_t* out = static_cast<int32_t*>(best.mutable_data_ptr());
  for (int64_t row = 0; row < rows.size(0); ++row, in += kShifts) {
    int32_t winner = 0;
    bool nan = in[0] != in[0];
    for (int32_t s = 1; s < kShifts; ++s) {
      nan = nan || in[s] != in[s];
      if (in[s] < in[winner]) winner = s;
    }
    out[row] = nan ? kShifts : winner + 1;
  }
  return best;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("shift_error_", shift_error);
  m.impl("best_shift", best_shift);
}

}  // namespace amct_ext::cpu
