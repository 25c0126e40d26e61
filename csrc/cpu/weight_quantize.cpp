// quantize_weight: int8 codes of a weight with given scales.
#include <torch/library.h>

#include <vector>

#include "cpu/per_channel.h"
#include "cpu/weight_scales.h"
#include "ops/weight_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

Tensor quantize_weight(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  const char* op = "quantize_weight";
  channel_axis = check_scaled_weight(op, w, scale, num_bits, channel_axis, 8);
  const auto range = math::code_range(static_cast<int>(num_bits));
  const std::vector<double> scales = floored_scales(scale, w);
  const Tensor source = dense(w);
  Tensor y = at::empty_like(source, source.options().dtype(at::kChar));
  const void* in = source.const_data_ptr();
  int8_t* out = static_cast<int8_t*>(y.mutable_data_ptr());
  const size_t size = w.element_size();
  const auto loop = loops().quantize_codes[element_of(w)];
  for_channel_blocks(axis_view(source, channel_axis), [&](int64_t channel, int64_t begin, int64_t n) {
    loop(element_ptr(in, begin, size), out + begin, n, {scales[channel], range.lowest, range.highest});
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) { m.impl("quantize_weight", quantize_weight); }

}  // namespace amct_ext::cpu
