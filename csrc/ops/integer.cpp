#include "ops/integer.h"

#include "ops/autograd.h"
#include "ops/typed_op.h"

namespace amct_ext {

TORCH_LIBRARY_FRAGMENT(amct_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "ulq_quantize(Tensor x, Tensor clip_max, Tensor clip_min, Tensor prev_clip_max, Tensor prev_clip_min, "
      "int num_bits=8, bool fixed_min=False) "
      "-> (Tensor codes, Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor invalid)",
      tags);
  m.def("pack_weight(Tensor w, Tensor scale, int num_bits=8) -> (Tensor packed, Tensor sums)", tags);
  m.def(
      "integer_conv2d(Tensor codes, Tensor x_scale, Tensor x_offset, Tensor packed, Tensor sums, Tensor w_scale, "
      "Tensor? bias, int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
      "bool channels_last=False, Tensor? addend=None, float? lowest=None, float? highest=None) -> Tensor",
      tags);
  m.def(
      "integer_conv2d_codes(Tensor codes, Tensor x_scale, Tensor x_offset, Tensor packed, Tensor sums, Tensor w_scale, "
      "Tensor? bias, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, float? lowest, "
      "float? highest, Tensor clip_max, Tensor clip_min, Tensor prev_clip_max, Tensor prev_clip_min, int num_bits=8, "
      "bool fixed_min=False) "
      "-> (Tensor codes, Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor invalid)",
      tags);
  m.def(
      "integer_linear(Tensor codes, Tensor x_scale, Tensor x_offset, Tensor packed, Tensor sums, Tensor w_scale, "
      "Tensor? bias=None) -> Tensor",
      tags);
  m.def(
      "integer_conv2d_accumulators(Tensor codes, Tensor x_offset, Tensor packed, Tensor sums, int[2] kernel_size, "
      "int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor",
      tags);
  m.def("integer_linear_accumulators(Tensor codes, Tensor x_offset, Tensor packed, Tensor sums) -> Tensor", tags);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_quantize(const Tensor& x, const Tensor& clip_max,
                                                                        const Tensor& clip_min,
                                                                        const Tensor& prev_clip_max,
                                                                        const Tensor& prev_clip_min, int64_t num_bits,
                                                                        bool fixed_min) {
  return op<ulq_quantize>("ulq_quantize")
      .call(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
}

std::tuple<Tensor, Tensor> pack_weight(const Tensor& w, const Tensor& scale, int64_t num_bits) {
  return op<pack_weight>("pack_weight").call(w, scale, num_bits);
}

Tensor integer_conv2d(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                      const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias,
                      at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, bool channels_last, const std::optional<Tensor>& addend,
                      std::optional<double> lowest, std::optional<double> highest) {
  return op<integer_conv2d>("integer_conv2d")
      .call(codes, x_scale, x_offset, packed, sums, w_scale, bias, kernel_size, stride, padding, dilation,
            channels_last, addend, lowest, highest);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> integer_conv2d_codes(
    const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed, const Tensor& sums,
    const Tensor& w_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, std::optional<double> lowest, std::optional<double> highest,
    const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max, const Tensor& prev_clip_min,
    int64_t num_bits, bool fixed_min) {
  return op<integer_conv2d_codes>("integer_conv2d_codes")
      .call(codes, x_scale, x_offset, packed, sums, w_scale, bias, kernel_size, stride, padding, dilation, lowest,
            highest, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
}

Tensor integer_linear(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                      const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias) {
  return op<integer_linear>("integer_linear").call(codes, x_scale, x_offset, packed, sums, w_scale, bias);
}

Tensor integer_conv2d_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                   const Tensor& sums, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                   at::IntArrayRef padding, at::IntArrayRef dilation) {
  return op<integer_conv2d_accumulators>("integer_conv2d_accumulators")
      .call(codes, x_offset, packed, sums, kernel_size, stride, padding, dilation);
}

Tensor integer_linear_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                   const Tensor& sums) {
  return op<integer_linear_accumulators>("integer_linear_accumulators").call(codes, x_offset, packed, sums);
}

TORCH_LIBRARY_IMPL(amct_ext, Autograd, m) {
  without_gradient(m, {"ulq_quantize", "pack_weight", "integer_conv2d", "integer_conv2d_codes", "integer_linear",
                       "integer_conv2d_accumulators", "integer_linear_accumulators"});
}

}  // namespace amct_ext
