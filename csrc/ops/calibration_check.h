// Checks of the shift search, for every device that has kernels of it.
#pragma once

#include "common/check.h"
#include "common/quant_math.h"

namespace amct_ext {

// What shift_error_ takes; returns the channel axis counted from the front.
inline int64_t check_shift_error(const char* op, const at::Tensor& x, const at::Tensor& deq_scale,
                                 const at::Tensor& errors, int64_t channel_axis) {
  using math::kShifts;
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
  return channel_axis;
}

// What best_shift takes.
inline void check_shift_errors(const char* op, const at::Tensor& errors) {
  using math::kShifts;
  check_type(op, "errors", errors, at::kDouble);
  TORCH_CHECK_VALUE(errors.dim() == 2 && errors.size(1) == kShifts, op, ": errors must have shape (channels, ", kShifts,
                    "), not ", errors.sizes());
}

}  // namespace amct_ext
