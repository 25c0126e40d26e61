// lsq_fake_quantize and its backward.
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/gather_rows.h"
#include "cpu/per_channel.h"
#include "cpu/result_pool.h"
#include "cpu/weight_scales.h"
#include "ops/weight_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

Tensor lsq_fake_quantize(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
                         std::optional<double>) {
  const char* op = "lsq_fake_quantize";
  channel_axis = check_scaled_weight(op, w, scale, num_bits, channel_axis);
  const auto range = math::code_range(static_cast<int>(num_bits));
  const std::vector<double> scales = floored_scales(scale, w);
  const Tensor source = dense(w);
  Tensor y = pooled_like(source, Lifetime::kStep);
  const void* in = source.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const size_t size = w.element_size();
  const auto loop = loops().quantize[element_of(w)];
  const AxisView view = axis_view(source, channel_axis);
  if (has_short_runs(view)) {
    for_gathered_rows<1>(view, {{{in, size}}}, out, size, [&](int64_t channel, const auto& row, char* to, int64_t n) {
      loop(row[0], to, n, {scales[channel], range.lowest, range.highest});
    });
    return y;
  }
  for_channel_blocks(view, [&](int64_t channel, int64_t begin, int64_t n) {
    loop(element_ptr(in, begin, size), element_ptr(out, begin, size), n,
         {scales[channel], range.lowest, range.highest});
  });
  return y;
}

Tensor lsq_fake_quantize_backward(const Tensor& grad, const Tensor& w, const Tensor& scale, int64_t num_bits,
                                  std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  const char* op = "lsq_fake_quantize_backward";
  channel_axis = check_weight(op, w, num_bits, channel_axis);
  check_floating(op, "grad", grad);
  check_floating(op, "scale", scale);
  check_scale(op, scale, w, channel_axis);
  check_same_shape(op, "grad", grad, "w", w);
  const auto range = math::code_range(static_cast<int>(num_bits));
  const std::vector<double> scales = floored_scales(scale, w);
  const Tensor source = to_type(dense(w), common_type(grad, w)), upstream = match_layout(grad, source);
  const void *in = source.const_data_ptr(), *up = upstream.const_data_ptr();
  const size_t size = source.element_size();
  const auto loop = loops().lsq_backward[element_of(source)];
  const AxisView view = axis_view(source, channel_axis);
  std::vector<double> sums(view.size, 0.0);
  if (has_short_runs(view)) {
    for_gathered_rows<2>(view, {{{up, size}, {in, size}}}, nullptr, 0,
                         [&](int64_t channel, const auto& row, char*, int64_t n) {
                           sums[channel] = loop(row[0], row[1], n, {scales[channel], range.lowest, range.highest});
                         });
  } else {
    sums = channel_sums(view, [&](int64_t channel, int64_t begin, int64_t n) {
      return loop(element_ptr(up, begin, size), element_ptr(in, begin, size), n,
                  {scales[channel], range.lowest, range.highest});
    });
  }
  const int64_t weights = scale.numel() ? std::max<int64_t>(w.numel() / scale.numel(), 1) : 1;
  const double factor = grad_factor.value_or(1.0 / std::sqrt(static_cast<double>(weights) * range.highest));
  for (double& sum : sums) sum *= factor;
  return tensor_of(sums, scale.sizes(), scale.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("lsq_fake_quantize", lsq_fake_quantize);
  m.impl("lsq_fake_quantize_backward", lsq_fake_quantize_backward);
}

}  // namespace amct_ext::cpu
