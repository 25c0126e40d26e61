// ulq_fake_quantize_: the activation op and the writes to a quantiser's state, in one call.
#include <torch/library.h>

#include <tuple>

#include "cpu/tensor_access.h"
#include "ops.h"
#include "ops/activation_check.h"

namespace amct_ext::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min,
                                                      const Tensor& prev_clip_max, const Tensor& prev_clip_min,
                                                      const Tensor& scale, const Tensor& offset, const Tensor& invalid,
                                                      int64_t num_bits, bool fixed_min) {
  check_state("ulq_fake_quantize_", x, scale, offset, invalid);
  auto [y, used_scale, used_offset, used_max, used_min, bad] =
      amct_ext::ulq_fake_quantize(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
  const double high = value_at(used_max, 0), low = value_at(used_min, 0);
  set_value(clip_max, 0, high);
  set_value(clip_min, 0, low);
  set_value(prev_clip_max, 0, high);
  set_value(prev_clip_min, 0, low);
  set_value(scale, 0, value_at(used_scale, 0));
  set_value(offset, 0, value_at(used_offset, 0));
  if (*static_cast<const bool*>(bad.const_data_ptr())) *static_cast<bool*>(invalid.mutable_data_ptr()) = true;
  return {std::move(y), std::move(used_max), std::move(used_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) { m.impl("ulq_fake_quantize_", ulq_fake_quantize_); }

}  // namespace amct_ext::cpu
