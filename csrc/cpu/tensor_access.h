// Elements and small tensors on the CPU, without the dispatcher, which takes most of the time of a small call.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "cpu/loop_table.h"

namespace amct_ext::cpu {

inline Element element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      return kFloat32;
  }
}

inline double value_at(const at::Tensor& x, int64_t i) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return static_cast<const double*>(x.const_data_ptr())[i];
    case at::kBFloat16:
      return static_cast<double>(static_cast<float>(static_cast<const c10::BFloat16*>(x.const_data_ptr())[i]));
    case at::kHalf:
      return static_cast<double>(static_cast<float>(static_cast<const c10::Half*>(x.const_data_ptr())[i]));
    default:
      return static_cast<double>(static_cast<const float*>(x.const_data_ptr())[i]);
  }
}

inline void set_value(const at::Tensor& x, int64_t i, double v) {
  switch (x.scalar_type()) {
    case at::kDouble:
      static_cast<double*>(x.mutable_data_ptr())[i] = v;
      return;
    case at::kBFloat16:
      static_cast<c10::BFloat16*>(x.mutable_data_ptr())[i] = static_cast<float>(v);
      return;
    case at::kHalf:
      static_cast<c10::Half*>(x.mutable_data_ptr())[i] = static_cast<float>(v);
      return;
    default:
      static_cast<float*>(x.mutable_data_ptr())[i] = static_cast<float>(v);
  }
}

// Element i of an array whose elements have `size` bytes.
inline const char* element_ptr(const void* data, int64_t i, size_t size) {
  return static_cast<const char*>(data) + i * static_cast<int64_t>(size);
}
inline char* element_ptr(void* data, int64_t i, size_t size) {
  return static_cast<char*>(data) + i * static_cast<int64_t>(size);
}

inline at::Tensor new_scalar(at::ScalarType type) { return at::Tensor(at::detail::empty_cpu({}, type)); }

inline at::Tensor scalar_like(const at::Tensor& like, double v) {
  at::Tensor result = new_scalar(like.scalar_type());
  set_value(result, 0, v);
  return result;
}

inline at::Tensor tensor_of(const std::vector<double>& values, at::IntArrayRef shape,
                            const at::TensorOptions& options) {
  at::Tensor result = at::empty(shape, options);
  for (size_t i = 0; i < values.size(); ++i) set_value(result, static_cast<int64_t>(i), values[i]);
  return result;
}

// As at::empty_like, with the layout that elementwise results of x have.
inline at::Tensor result_like(const at::Tensor& x, at::ScalarType type) {
  if (!x.is_non_overlapping_and_dense()) return at::empty_like(x, x.options().dtype(type));
  return at::Tensor(at::detail::empty_strided_cpu(x.sizes(), x.strides(), type));
}

}  // namespace amct_ext::cpu
