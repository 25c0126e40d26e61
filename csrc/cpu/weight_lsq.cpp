// lsq_fake_quantize and its backward, quantize_weight, filter_norms.
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/quant_math.h"
#include "cpu/gather_rows.h"
#include "cpu/parallel.h"
#include "cpu/result_pool.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

std::optional<int64_t> checked_axis(const char* op, const Tensor& w, std::optional<int64_t> axis) {
  return axis ? std::optional<int64_t>(check_axis(op, "channel_axis", w, *axis)) : std::nullopt;
}

std::optional<int64_t> check_weight(const char* op, const Tensor& w, int64_t num_bits, std::optional<int64_t> axis,
                                    int64_t most = 16) {
  check_floating(op, "w", w);
  check_bits(op, num_bits, most);
  return checked_axis(op, w, axis);
}

// Scales of a learned-scale op, with their floor, in the arithmetic type of w.
std::vector<double> floored(const Tensor& scale, const Tensor& w) {
  std::vector<double> values(scale.numel());
  const Tensor flat = scale.contiguous();
  for (size_t i = 0; i < values.size(); ++i) {
    const double v = value_at(flat, static_cast<int64_t>(i));
    values[i] = is_double(w) ? math::at_least(v, static_cast<double>(FLT_EPSILON))
                             : static_cast<double>(math::at_least(static_cast<float>(v), FLT_EPSILON));
  }
  return values;
}

// f(channel, first element, number of elements) for every run; one channel stays on one thread, its runs in order.
template <typename F>
void for_channels(const AxisView& view, const F& f) {
  for_rows(view.size, view.outer * view.inner, [&](int64_t channel) {
    for (int64_t o = 0; o < view.outer; ++o) f(channel, (o * view.size + channel) * view.inner, view.inner);
  });
}

template <typename F>
void for_pieces(const AxisView& view, const F& f) {
  if (view.size == 1) {
    for_blocks(view.outer * view.inner, [&](int64_t, int64_t begin, int64_t end) { f(0, begin, end - begin); });
  } else {
    for_channels(view, f);
  }
}

// One float64 sum per channel of f(first element, number of elements), the same bits for any number of threads.
template <typename F>
std::vector<double> channel_sums(const AxisView& view, const F& f) {
  std::vector<double> sums(view.size, 0.0);
  if (view.size == 1) {
    const int64_t n = view.outer * view.inner;
    std::vector<double> parts((n + kBlock - 1) / kBlock);
    for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) { parts[block] = f(begin, end - begin); });
    for (double part : parts) sums[0] += part;
  } else {
    for_channels(view, [&](int64_t channel, int64_t begin, int64_t n) { sums[channel] += f(begin, n); });
  }
  return sums;
}

Tensor from_values(const std::vector<double>& values, at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor result = at::empty(shape, options);
  for (size_t i = 0; i < values.size(); ++i) set_value(result, static_cast<int64_t>(i), values[i]);
  return result;
}

Tensor lsq_forward(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
                   std::optional<double>) {
  const char* op = "lsq_fake_quantize";
  channel_axis = check_weight(op, w, num_bits, channel_axis);
  check_floating(op, "scale", scale);
  check_scale(op, scale, w, channel_axis);
  const auto range = math::code_range(static_cast<int>(num_bits));
  const std::vector<double> scales = floored(scale, w);
  const Tensor source = dense(w);
  Tensor y = reused_like(source, Life::kStep);
  const void* in = source.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const size_t size = w.element_size();
  const auto loop = kernels().quantize[element_of(w)];
  const AxisView view = axis_view(source, channel_axis);
  if (short_runs(view)) {
    for_gathered<1>(view, {{{in, size}}}, out, size, [&](int64_t channel, const auto& row, char* to, int64_t n) {
      loop(row[0], to, n, {scales[channel], range.lowest, range.highest});
    });
    return y;
  }
  for_pieces(view, [&](int64_t channel, int64_t begin, int64_t n) {
    loop(at_element(in, begin, size), at_element(out, begin, size), n, {scales[channel], range.lowest, range.highest});
  });
  return y;
}

Tensor lsq_backward(const Tensor& grad, const Tensor& w, const Tensor& scale, int64_t num_bits,
                    std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  const char* op = "lsq_fake_quantize_backward";
  channel_axis = check_weight(op, w, num_bits, channel_axis);
  check_floating(op, "grad", grad);
  check_floating(op, "scale", scale);
  check_scale(op, scale, w, channel_axis);
  check_same_shape(op, "grad", grad, "w", w);
  const auto range = math::code_range(static_cast<int>(num_bits));
  const std::vector<double> scales = floored(scale, w);
  const Tensor source = to_type(dense(w), common_type(grad, w)), upstream = match_layout(grad, source);
  const void *in = source.const_data_ptr(), *up = upstream.const_data_ptr();
  const size_t size = source.element_size();
  const auto loop = kernels().lsq_backward[element_of(source)];
  const AxisView view = axis_view(source, channel_axis);
  std::vector<double> sums(view.size, 0.0);
  if (short_runs(view)) {
    for_gathered<2>(view, {{{up, size}, {in, size}}}, nullptr, 0,
                    [&](int64_t channel, const auto& row, char*, int64_t n) {
                      sums[channel] = loop(row[0], row[1], n, {scales[channel], range.lowest, range.highest});
                    });
  } else {
    sums = channel_sums(view, [&](int64_t begin, int64_t n) {
      const int64_t channel = view.size == 1 ? 0 : begin / view.inner % view.size;
      return loop(at_element(up, begin, size), at_element(in, begin, size), n,
                  {scales[channel], range.lowest, range.highest});
    });
  }
  const int64_t weights = scale.numel() ? std::max<int64_t>(w.numel() / scale.numel(), 1) : 1;
  const double factor = grad_factor.value_or(1.0 / std::sqrt(static_cast<double>(weights) * range.highest));
  for (double& sum : sums) sum *= factor;
  return from_values(sums, scale.sizes(), scale.options());
}

Tensor quantize_weight(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  const char* op = "quantize_weight";
  channel_axis = check_weight(op, w, num_bits, channel_axis, 8);
  check_floating(op, "scale", scale);
  check_scale(op, scale, w, channel_axis);
  const auto range = math::code_range(static_cast<int>(num_bits));
  const std::vector<double> scales = floored(scale, w);
  const Tensor source = dense(w);
  Tensor y = at::empty_like(source, source.options().dtype(at::kChar));
  const void* in = source.const_data_ptr();
  int8_t* out = static_cast<int8_t*>(y.mutable_data_ptr());
  const size_t size = w.element_size();
  const auto loop = kernels().codes[element_of(w)];
  for_pieces(axis_view(source, channel_axis), [&](int64_t channel, int64_t begin, int64_t n) {
    loop(at_element(in, begin, size), out + begin, n, {scales[channel], range.lowest, range.highest});
  });
  return y;
}

Tensor filter_norms(const Tensor& w, int64_t axis) {
  const char* op = "filter_norms";
  check_floating(op, "w", w);
  axis = check_axis(op, "axis", w, axis);
  const Tensor source = dense(w);
  const void* in = source.const_data_ptr();
  const size_t size = w.element_size();
  const auto loop = kernels().sum_squares[element_of(w)];
  std::vector<double> sums = channel_sums(
      axis_view(source, axis), [&](int64_t begin, int64_t n) { return loop(at_element(in, begin, size), n); });
  for (double& sum : sums) sum = std::sqrt(sum);
  return from_values(sums, {w.size(axis)}, w.options().dtype(accumulate_type(w)));
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("lsq_fake_quantize", lsq_forward);
  m.impl("lsq_fake_quantize_backward", lsq_backward);
  m.impl("quantize_weight", quantize_weight);
  m.impl("filter_norms", filter_norms);
}

}  // namespace amct_ext::cpu
