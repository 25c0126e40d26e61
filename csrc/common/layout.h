// Memory layouts, for every device: dense tensors, and one axis of them seen in memory order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>

namespace amct_ext {

inline bool is_double(const at::Tensor& x) { return x.scalar_type() == at::kDouble; }
inline at::ScalarType accumulate_type(const at::Tensor& x) { return is_double(x) ? at::kDouble : at::kFloat; }

// The type a backward pass computes in: that of both tensors if they agree, else the accumulation type of x. It holds x
// exactly; a float64 gradient of narrower data is rounded.
inline at::ScalarType common_type(const at::Tensor& grad, const at::Tensor& x) {
  return grad.scalar_type() == x.scalar_type() ? x.scalar_type() : accumulate_type(x);
}

inline at::Tensor to_type(const at::Tensor& x, at::ScalarType type) { return x.scalar_type() == type ? x : x.to(type); }

// x itself if it is non-overlapping and dense; else a dense copy with the strides of its elementwise results.
inline at::Tensor dense(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x);
}

// `other` with the strides and type of x, so that one linear loop reads both.
inline at::Tensor match_layout(const at::Tensor& other, const at::Tensor& x) {
  if (other.strides() == x.strides() && other.scalar_type() == x.scalar_type()) return other;
  return at::empty_like(x).copy_(other);
}

// A bool mask with the strides of x.
inline at::Tensor match_mask_layout(const at::Tensor& mask, const at::Tensor& x) {
  return mask.strides() == x.strides() ? mask : at::empty_like(x, x.options().dtype(at::kBool)).copy_(mask);
}

// A dense tensor seen along one axis, in memory order: [outer, size, inner]. Each index along the axis owns `outer`
// runs of `inner` neighbouring elements.
struct AxisView {
  int64_t outer, size, inner;
};

// Without an axis the whole tensor is one run.
inline AxisView axis_view(const at::Tensor& x, std::optional<int64_t> axis) {
  if (!axis) return {1, 1, x.numel()};
  const int64_t size = x.size(*axis);
  if (x.numel() == 0) return {0, size, 0};
  // The stride of an axis of size 1 is arbitrary; any order of the other axes will do.
  const int64_t inner = size > 1 ? x.stride(*axis) : x.numel();
  return {x.numel() / (size * inner), size, inner};
}

}  // namespace amct_ext
