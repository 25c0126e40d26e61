// The straight-through rules written in torch's own ops: what differentiates any number of times and under torch.func.
// The kernels of the backward ops compute the same, faster, and once.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace amct_ext {

using at::Tensor;

// y, bit for bit, with the derivatives of `linear` (same type and shape, finite where y is).
Tensor with_derivatives_of(const Tensor& y, const Tensor& linear);

// The straight-through rules. Rounding counts as adding a constant, the rounding error, so each op is linear in its
// inputs, with slopes that are constants.
struct UlqRule {
  UlqRule(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits);

  // The sum of what x and the clips contribute, in the type of x.
  Tensor forward(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min) const;
  // Its transpose: gradients of x (in the type of grad) and of the clips.
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad) const;

 private:
  Tensor inside_, by_max_, by_min_;
  at::ScalarType max_type_, min_type_;
};

struct LsqRule {
  LsqRule(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
          std::optional<double> grad_factor);

  Tensor forward(const Tensor& w, const Tensor& scale) const;
  Tensor backward_of_scale(const Tensor& grad) const;

 private:
  Tensor along_channels(const Tensor& scale) const;

  Tensor slope_;  // times the factor on the scale's gradient
  std::optional<int64_t> channel_axis_;
  at::DimVector scale_shape_;
  at::ScalarType scale_type_;
};

}  // namespace amct_ext
