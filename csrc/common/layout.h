// Memory layouts, for every device: tensors without holes and one axis of them seen in memory order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>

namespace amct_ext {

inline bool wide(const at::Tensor& x) { return x.scalar_type() == at::kDouble; }
inline at::ScalarType accumulate_type(const at::Tensor& x) { return wide(x) ? at::kDouble : at::kFloat; }

// The type in which a gradient meets the data it belongs to: that of both, or the one that the data is reckoned in.
// It holds the data exactly, and the gradient but for a float64 one of narrower data.
inline at::ScalarType shared_type(const at::Tensor& grad, const at::Tensor& x) {
  return grad.scalar_type() == x.scalar_type() ? x.scalar_type() : accumulate_type(x);
}

inline at::Tensor in_type(const at::Tensor& x, at::ScalarType type) { return x.scalar_type() == type ? x : x.to(type); }

// x where its memory has no holes; else a copy of it in the layout its elementwise results have.
inline at::Tensor without_holes(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x);
}

// other in the layout (and type) of x, so that both can be walked in memory order.
inline at::Tensor laid_out_as(const at::Tensor& other, const at::Tensor& x) {
  if (other.strides() == x.strides() && other.scalar_type() == x.scalar_type()) return other;
  return at::empty_like(x).copy_(other);
}

// A mask in the memory order of x.
inline at::Tensor mask_laid_out_as(const at::Tensor& mask, const at::Tensor& x) {
  return mask.strides() == x.strides() ? mask : at::empty_like(x, x.options().dtype(at::kBool)).copy_(mask);
}

// A tensor without holes seen along one axis, in memory order: `outer` times `count` runs of `inner` elements.
struct Runs {
  int64_t outer, count, inner;
};

inline Runs runs_along(const at::Tensor& x, std::optional<int64_t> axis) {
  if (!axis) return {1, 1, x.numel()};
  const int64_t count = x.size(*axis);
  if (x.numel() == 0) return {0, count, 0};
  int64_t inner = 1;
  if (count > 1) {
    inner = x.stride(*axis);
  } else {
    inner = x.numel();  // the stride of an axis of one is arbitrary; every order of the rest will do
  }
  return {x.numel() / (count * inner), count, inner};
}

}  // namespace amct_ext
