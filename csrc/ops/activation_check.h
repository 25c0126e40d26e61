// Checks of the ops on activations, for every device that has kernels of them.
#pragma once

#include "common/check.h"

namespace amct_ext {

// One floating-point value on the device of x.
inline void check_value(const char* op, const char* name, const at::Tensor& value, const at::Tensor& x) {
  check_floating(op, name, value);
  check_scalar(op, name, value);
  check_device(op, name, value, "x", x);
}

// The clips of a forward on x.
inline void check_clips(const char* op, const at::Tensor& x, const at::Tensor& clip_max, const at::Tensor& clip_min,
                        const at::Tensor& prev_clip_max, const at::Tensor& prev_clip_min) {
  check_value(op, "clip_max", clip_max, x);
  check_value(op, "clip_min", clip_min, x);
  check_value(op, "prev_clip_max", prev_clip_max, x);
  check_value(op, "prev_clip_min", prev_clip_min, x);
}

// What ulq_fake_quantize_ writes beside the clips.
inline void check_state(const char* op, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& offset,
                        const at::Tensor& invalid) {
  check_value(op, "scale", scale, x);
  check_value(op, "offset", offset, x);
  check_scalar(op, "invalid", invalid);
  check_type(op, "invalid", invalid, at::kBool);
  check_device(op, "invalid", invalid, "x", x);
}

inline void check_ulq_backward(const char* op, const at::Tensor& grad, const at::Tensor& x, const at::Tensor& clip_max,
                               const at::Tensor& clip_min, int64_t num_bits) {
  check_floating(op, "grad", grad);
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  check_value(op, "clip_max", clip_max, x);
  check_value(op, "clip_min", clip_min, x);
  check_same_shape(op, "grad", grad, "x", x);
  check_device(op, "grad", grad, "x", x);
}

}  // namespace amct_ext
