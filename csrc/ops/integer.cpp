// The C++ functions of ops.h: typed calls through the dispatcher.
#include <ATen/core/dispatch/Dispatcher.h>

#include "ops.h"

namespace amct_ext {
namespace {

// The typed handle of an op, looked up once.
template <typename Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_fake_quantize(const Tensor& x, const Tensor& clip_max,
                                                                             const Tensor& clip_min,
                                                                             const Tensor& prev_clip_max,
                                                                             const Tensor& prev_clip_min,
                                                                             int64_t num_bits, bool fixed_min) {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  static const auto call =
      op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, bool)>(
          "amct_ext::ulq_fake_quantize");
  return call.call(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
}

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min,
                                                      const Tensor& prev_clip_max, const Tensor& prev_clip_min,
                                                      const Tensor& scale, const Tensor& offset, const Tensor& invalid,
                                                      int64_t num_bits, bool fixed_min) {
  using Results = std::tuple<Tensor, Tensor, Tensor>;
  static const auto call =
      op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                 const Tensor&, const Tensor&, int64_t, bool)>("amct_ext::ulq_fake_quantize_");
  return call.call(x, clip_max, clip_min, prev_clip_max, prev_clip_min, scale, offset, invalid, num_bits, fixed_min);
}

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                              const Tensor& clip_max, const Tensor& clip_min,
                                                              int64_t num_bits) {
  using Results = std::tuple<Tensor, Tensor, Tensor>;
  static const auto call = op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t)>(
      "amct_ext::ulq_fake_quantize_backward");
  return call.call(grad, x, clip_max, clip_min, num_bits);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> search_clip_range(const Tensor& x, int64_t num_bits, bool with_offset) {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  static const auto call = op<Results(const Tensor&, int64_t, bool)>("amct_ext::search_clip_range");
  return call.call(x, num_bits, with_offset);
}

void range_histogram_(const Tensor& x, const Tensor& histogram, const Tensor& extremes) {
  static const auto call = op<void(const Tensor&, const Tensor&, const Tensor&)>("amct_ext::range_histogram_");
  call.call(x, histogram, extremes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> search_clip_range_histogram(const Tensor& histogram,
                                                                               const Tensor& extremes,
                                                                               int64_t num_bits) {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  static const auto call = op<Results(const Tensor&, const Tensor&, int64_t)>("amct_ext::search_clip_range_histogram");
  return call.call(histogram, extremes, num_bits);
}

std::tuple<Tensor, Tensor> arq_fake_quantize(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis) {
  using Results = std::tuple<Tensor, Tensor>;
  static const auto call = op<Results(const Tensor&, int64_t, std::optional<int64_t>)>("amct_ext::arq_fake_quantize");
  return call.call(w, num_bits, channel_axis);
}

Tensor lsq_fake_quantize(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
                         std::optional<double> grad_factor) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, int64_t, std::optional<int64_t>, std::optional<double>)>(
          "amct_ext::lsq_fake_quantize");
  return call.call(w, scale, num_bits, channel_axis, grad_factor);
}

Tensor lsq_fake_quantize_backward(const Tensor& grad, const Tensor& w, const Tensor& scale, int64_t num_bits,
                                  std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, std::optional<int64_t>, std::optional<double>)>(
          "amct_ext::lsq_fake_quantize_backward");
  return call.call(grad, w, scale, num_bits, channel_axis, grad_factor);
}

Tensor quantize_weight(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, int64_t, std::optional<int64_t>)>("amct_ext::quantize_weight");
  return call.call(w, scale, num_bits, channel_axis);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_quantize(const Tensor& x, const Tensor& clip_max,
                                                                        const Tensor& clip_min,
                                                                        const Tensor& prev_clip_max,
                                                                        const Tensor& prev_clip_min, int64_t num_bits,
                                                                        bool fixed_min) {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  static const auto call =
      op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, bool)>(
          "amct_ext::ulq_quantize");
  return call.call(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
}

std::tuple<Tensor, Tensor> pack_weight(const Tensor& w, const Tensor& scale, int64_t num_bits) {
  using Results = std::tuple<Tensor, Tensor>;
  static const auto call = op<Results(const Tensor&, const Tensor&, int64_t)>("amct_ext::pack_weight");
  return call.call(w, scale, num_bits);
}

Tensor integer_conv2d(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                      const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias,
                      at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, bool channels_last, const std::optional<Tensor>& addend,
                      std::optional<double> lowest, std::optional<double> highest) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const std::optional<Tensor>&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, bool,
                const std::optional<Tensor>&, std::optional<double>, std::optional<double>)>(
          "amct_ext::integer_conv2d");
  return call.call(codes, x_scale, x_offset, packed, sums, w_scale, bias, kernel_size, stride, padding, dilation,
                   channels_last, addend, lowest, highest);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> integer_conv2d_codes(
    const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed, const Tensor& sums,
    const Tensor& w_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, std::optional<double> lowest, std::optional<double> highest,
    const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max, const Tensor& prev_clip_min,
    int64_t num_bits, bool fixed_min) {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  static const auto call =
      op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                 const std::optional<Tensor>&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                 std::optional<double>, std::optional<double>, const Tensor&, const Tensor&, const Tensor&,
                 const Tensor&, int64_t, bool)>("amct_ext::integer_conv2d_codes");
  return call.call(codes, x_scale, x_offset, packed, sums, w_scale, bias, kernel_size, stride, padding, dilation,
                   lowest, highest, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
}

Tensor integer_linear(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                      const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias) {
  static const auto call = op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     const Tensor&, const std::optional<Tensor>&)>("amct_ext::integer_linear");
  return call.call(codes, x_scale, x_offset, packed, sums, w_scale, bias);
}

Tensor integer_conv2d_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                   const Tensor& sums, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                   at::IntArrayRef padding, at::IntArrayRef dilation) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef,
                at::IntArrayRef, at::IntArrayRef)>("amct_ext::integer_conv2d_accumulators");
  return call.call(codes, x_offset, packed, sums, kernel_size, stride, padding, dilation);
}

Tensor integer_linear_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                   const Tensor& sums) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("amct_ext::integer_linear_accumulators");
  return call.call(codes, x_offset, packed, sums);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_fake_quantize_many(at::TensorList weights, int64_t num_bits,
                                                                            at::IntArrayRef channel_axes) {
  using Results = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;
  static const auto call = op<Results(at::TensorList, int64_t, at::IntArrayRef)>("amct_ext::arq_fake_quantize_many");
  return call.call(weights, num_bits, channel_axes);
}

Tensor apply_mask(const Tensor& w, const Tensor& mask) {
  static const auto call = op<Tensor(const Tensor&, const Tensor&)>("amct_ext::apply_mask");
  return call.call(w, mask);
}

std::tuple<Tensor, Tensor> sparsify_2to4(const Tensor& w, int64_t axis) {
  using Results = std::tuple<Tensor, Tensor>;
  static const auto call = op<Results(const Tensor&, int64_t)>("amct_ext::sparsify_2to4");
  return call.call(w, axis);
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                                    std::optional<int64_t> channel_axis) {
  using Results = std::tuple<Tensor, Tensor>;
  static const auto call =
      op<Results(const Tensor&, const Tensor&, int64_t, std::optional<int64_t>)>("amct_ext::sparse_arq_fake_quantize");
  return call.call(w, mask, num_bits, channel_axis);
}

std::tuple<Tensor, Tensor, Tensor> sparse_arq_fake_quantize_2to4(const Tensor& w, int64_t axis, int64_t num_bits,
                                                                 std::optional<int64_t> channel_axis) {
  using Results = std::tuple<Tensor, Tensor, Tensor>;
  static const auto call =
      op<Results(const Tensor&, int64_t, int64_t, std::optional<int64_t>)>("amct_ext::sparse_arq_fake_quantize_2to4");
  return call.call(w, axis, num_bits, channel_axis);
}

Tensor mask_2to4(const Tensor& w, int64_t axis) {
  static const auto call = op<Tensor(const Tensor&, int64_t)>("amct_ext::mask_2to4");
  return call.call(w, axis);
}

void refresh_mask_(const Tensor& w, const Tensor& mask, const Tensor& step, int64_t update_freq, int64_t axis) {
  static const auto call =
      op<void(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t)>("amct_ext::refresh_mask_");
  call.call(w, mask, step, update_freq, axis);
}

Tensor pack_mask(const Tensor& mask) {
  static const auto call = op<Tensor(const Tensor&)>("amct_ext::pack_mask");
  return call.call(mask);
}

Tensor unpack_mask(const Tensor& words, at::IntArrayRef shape) {
  static const auto call = op<Tensor(const Tensor&, c10::SymIntArrayRef)>("amct_ext::unpack_mask");
  return call.call(words, c10::fromIntArrayRefSlow(shape));
}

Tensor filter_norms(const Tensor& w, int64_t axis) {
  static const auto call = op<Tensor(const Tensor&, int64_t)>("amct_ext::filter_norms");
  return call.call(w, axis);
}

void shift_error_(const Tensor& x, const Tensor& deq_scale, const Tensor& errors, int64_t channel_axis) {
  static const auto call = op<void(const Tensor&, const Tensor&, const Tensor&, int64_t)>("amct_ext::shift_error_");
  call.call(x, deq_scale, errors, channel_axis);
}

Tensor best_shift(const Tensor& errors) {
  static const auto call = op<Tensor(const Tensor&)>("amct_ext::best_shift");
  return call.call(errors);
}

}  // namespace amct_ext
