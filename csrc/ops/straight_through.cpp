#include "ops/straight_through.h"

#include <ATen/ATen.h>

#include <cfloat>
#include <cmath>

#include "common/layout.h"
#include "common/quant_math.h"

namespace amct_ext {

Tensor with_derivatives_of(const Tensor& y, const Tensor& linear) {
  // The difference is a positive zero, which leaves zeros of either sign as they are.
  return y.detach() - (linear.detach() - linear);
}

UlqRule::UlqRule(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits)
    : max_type_(clip_max.scalar_type()), min_type_(clip_min.scalar_type()) {
  const at::ScalarType type = accumulate_type(x);
  const math::CodeRange range = math::code_range(static_cast<int>(num_bits));
  const double levels = range.highest - range.lowest;
  const Tensor values = x.detach().to(type);
  const Tensor high = clip_max.detach().reshape({}).to(type), low = clip_min.detach().reshape({}).to(type);
  const Tensor width = (high - low) / at::full_like(high, levels), small = width < FLT_EPSILON;
  const Tensor scale = at::where(small, at::ones_like(width), width);
  const Tensor offset = at::where(small, at::full_like(width, range.lowest), at::round(range.lowest - low / width));
  const Tensor above = values > scale * (range.highest - offset), below = values < scale * (range.lowest - offset);
  const Tensor z = at::where(above, high, at::where(below, low, values)) / scale;
  const Tensor error = (at::round(z) - z) / levels;
  inside_ = (above | below).logical_not();
  by_max_ = error + above;
  by_min_ = below.to(type) - error;
}

Tensor UlqRule::forward(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min) const {
  const auto clip = [&](const Tensor& value) { return value.reshape({}).to(by_max_.scalar_type()); };
  const Tensor passed = at::where(inside_, x, at::zeros_like(x));
  return passed + (by_max_ * clip(clip_max) + by_min_ * clip(clip_min)).to(x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> UlqRule::backward(const Tensor& grad) const {
  const Tensor upstream = grad.to(by_max_.scalar_type());
  const auto total = [&](const Tensor& slope, at::ScalarType type) {
    return (slope * upstream).sum(at::kDouble).to(type);
  };
  return {at::where(inside_, grad, at::zeros_like(grad)), total(by_max_, max_type_), total(by_min_, min_type_)};
}

LsqRule::LsqRule(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
                 std::optional<double> grad_factor)
    : channel_axis_(channel_axis), scale_shape_(scale.sizes()), scale_type_(scale.scalar_type()) {
  const at::ScalarType type = accumulate_type(w);
  const math::CodeRange range = math::code_range(static_cast<int>(num_bits));
  if (channel_axis_) channel_axis_ = *channel_axis_ < 0 ? *channel_axis_ + w.dim() : *channel_axis_;
  const Tensor values = w.detach().to(type);
  slope_ = values;  // for its shape
  const Tensor step = along_channels(scale.detach().to(type).clamp_min(FLT_EPSILON));
  const Tensor z = values / step;
  const auto bound = [&](double code) { return at::full_like(z, code); };
  slope_ = at::where(values < range.lowest * step, bound(range.lowest),
                     at::where(values > range.highest * step, bound(range.highest), at::round(z) - z));
  const int64_t per_scale = std::max<int64_t>(w.numel() / std::max<int64_t>(scale.numel(), 1), 1);
  slope_ = slope_ * grad_factor.value_or(1.0 / std::sqrt(static_cast<double>(per_scale) * range.highest));
}

Tensor LsqRule::along_channels(const Tensor& scale) const {
  if (!channel_axis_) return scale.reshape({});
  at::DimVector shape(slope_.dim(), 1);
  shape[*channel_axis_] = slope_.size(*channel_axis_);
  return scale.reshape(shape);
}

Tensor LsqRule::forward(const Tensor& w, const Tensor& scale) const {
  return w + (slope_ * along_channels(scale.to(slope_.scalar_type()))).to(w.scalar_type());
}

Tensor LsqRule::backward_of_scale(const Tensor& grad) const {
  Tensor terms = (slope_ * grad.to(slope_.scalar_type())).to(at::kDouble);
  if (channel_axis_) {
    at::DimVector axes;
    for (int64_t axis = 0; axis < terms.dim(); ++axis) {
      if (axis != *channel_axis_) axes.push_back(axis);
    }
    if (!axes.empty()) terms = terms.sum(axes);
  } else {
    terms = terms.sum();
  }
  return terms.to(scale_type_).reshape(scale_shape_);
}

}  // namespace amct_ext
