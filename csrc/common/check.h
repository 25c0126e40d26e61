// Input checks that all devices share. The torch references raise the same errors; dtypes
// and shapes are printed as Python prints them there.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace amct_ext {

inline void check_floating(const char* op, const char* name, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op, ": ",
                   name, " must be float32, float64, float16 or bfloat16, not ", type);
}

inline void check_type(const char* op, const char* name, const at::Tensor& x, at::ScalarType type) {
  TORCH_CHECK_TYPE(x.scalar_type() == type, op, ": ", name, " must be ", type, ", not ", x.scalar_type());
}

inline void check_bits(const char* op, int64_t num_bits, int64_t most = 16) {
  TORCH_CHECK_VALUE(num_bits >= 2 && num_bits <= most, op, ": num_bits must be between 2 and ", most, ", not ",
                    num_bits);
}

// The axis counted from the front.
inline int64_t check_axis(const char* op, const char* name, const at::Tensor& x, int64_t axis) {
  TORCH_CHECK_INDEX(axis >= -x.dim() && axis < x.dim(), op, ": ", name, " ", axis, " is out of range for a tensor of ",
                    x.dim(), " dimensions");
  return axis < 0 ? axis + x.dim() : axis;
}

inline void check_scalar(const char* op, const char* name, const at::Tensor& value) {
  TORCH_CHECK_VALUE(value.numel() == 1, op, ": ", name, " must hold one value, not shape ", value.sizes());
}

inline void check_same_shape(const char* op, const char* name, const at::Tensor& x, const char* other_name,
                             const at::Tensor& other) {
  TORCH_CHECK_VALUE(x.sizes() == other.sizes(), op, ": ", name, " must have the shape of ", other_name, ", ",
                    other.sizes(), ", not ", x.sizes());
}

// For kernels that take pointers into more than one tensor: a CPU value would be an address that the GPU cannot read.
inline void check_device(const char* op, const char* name, const at::Tensor& x, const char* other_name,
                         const at::Tensor& other) {
  TORCH_CHECK_VALUE(x.device() == other.device(), op, ": ", name, " must be on the device of ", other_name, ", ",
                    other.device(), ", not on ", x.device());
}

// float32, of the shape and on the device of another tensor.
inline void check_float_like(const char* op, const char* name, const at::Tensor& x, const char* other_name,
                             const at::Tensor& other) {
  check_type(op, name, x, at::kFloat);
  check_same_shape(op, name, x, other_name, other);
  check_device(op, name, x, other_name, other);
}

inline void check_scale(const char* op, const at::Tensor& scale, const at::Tensor& w,
                        std::optional<int64_t> channel_axis) {
  const int64_t expected = channel_axis ? w.size(*channel_axis) : 1;
  TORCH_CHECK_VALUE(scale.numel() == expected, op, ": scale must hold ", expected, " value(s) for a weight of shape ",
                    w.sizes(), ", not shape ", scale.sizes());
}

}  // namespace amct_ext
