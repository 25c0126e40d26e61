// Checks of the ops on activations, for every device that has kernels of them.
#pragma once

#include <c10/util/string_view.h>

#include <optional>

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
                               const at::Tensor& clip_min, int64_t num_bits, const char* name = "x") {
  check_floating(op, "grad", grad);
  check_floating(op, name, x);
  check_bits(op, num_bits);
  check_value(op, "clip_max", clip_max, x);
  check_value(op, "clip_min", clip_min, x);
  check_same_shape(op, "grad", grad, name, x);
  check_device(op, "grad", grad, name, x);
}

// The ops that take apart what a quantiser and a ReLU before it do backward: float32 alone.
inline void check_ulq_relu(const char* op, const at::Tensor& grad, const char* name, const at::Tensor& x,
                           const std::optional<at::Tensor>& addend, const at::Tensor& clip_max,
                           const at::Tensor& clip_min, int64_t num_bits) {
  check_type(op, "grad", grad, at::kFloat);
  check_type(op, name, x, at::kFloat);
  check_ulq_backward(op, grad, x, clip_max, clip_min, num_bits, name);
  if (addend) check_float_like(op, "addend", *addend, name, x);
}

// One float32 value for each index of axis 1 of x.
inline void check_channels(const char* op, const char* name, const at::Tensor& values, const at::Tensor& x) {
  check_type(op, name, values, at::kFloat);
  check_device(op, name, values, "x", x);
  TORCH_CHECK_VALUE(values.dim() == 1 && values.numel() == x.size(1) && values.is_contiguous(), op, ": ", name,
                    " must hold ", x.size(1), " contiguous value(s), one a channel, not shape ", values.sizes());
}

inline void check_batch_norm_input(const char* op, const at::Tensor& x) {
  check_type(op, "x", x, at::kFloat);
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x must have at least 2 dimensions, not ", x.dim());
}

inline void check_batch_norm_statistics(const char* op, const at::Tensor& x,
                                        const std::optional<at::Tensor>& running_mean,
                                        const std::optional<at::Tensor>& running_var) {
  check_batch_norm_input(op, x);
  TORCH_CHECK_VALUE(x.numel() > x.size(1), op, ": x must hold more than one value a channel, not shape ", x.sizes());
  if (running_mean) check_channels(op, "running_mean", *running_mean, x);
  if (running_var) check_channels(op, "running_var", *running_var, x);
}

// The input, statistics and parameters of a BatchNorm along axis 1, and the activation function behind it.
inline void check_batch_norm(const char* op, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                             const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                             c10::string_view activation, std::optional<double> lowest, std::optional<double> highest) {
  check_batch_norm_input(op, x);
  check_channels(op, "mean", mean, x);
  check_channels(op, "invstd", invstd, x);
  if (weight) check_channels(op, "weight", *weight, x);
  if (bias) check_channels(op, "bias", *bias, x);
  TORCH_CHECK_VALUE(activation == "none" || activation == "hardswish", op,
                    ": activation must be 'none' or 'hardswish', not '", activation, "'");
  TORCH_CHECK_VALUE(activation == "none" || !(lowest || highest), op, ": hardswish takes no bounds");
}

}  // namespace amct_ext
