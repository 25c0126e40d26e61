// Learned clips of activations: scale and offset before the data is read, 0-dim results after it; their gradients.
#pragma once

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "common/layout.h"
#include "common/quant_math.h"
#include "cpu/tensor_access.h"
#include "ops/activation_check.h"

namespace amct_ext::cpu {

// Effective clips, with scale and offset of the code range between them.
struct Clips {
  double scale, offset, high, low;

  bool valid() const { return math::is_finite(scale) && scale > 0; }
  UlqForwardParams params(int64_t num_bits) const {
    const math::CodeRange range = math::code_range(static_cast<int>(num_bits));
    return {scale, offset, range.lowest, range.highest};
  }
};

template <typename Acc>
Clips clips_from(const std::array<double, 4>& values, int num_bits, bool fixed_min) {
  Acc high = static_cast<Acc>(values[0]), low = static_cast<Acc>(values[1]);
  math::effective_clips(high, low, static_cast<Acc>(values[2]), static_cast<Acc>(values[3]), fixed_min);
  const auto affine = math::affine(high, low, num_bits);
  return {affine.scale, affine.offset, high, low};
}

// Checks the clips of an op on x and resolves them in the arithmetic type of x.
inline Clips resolve_clips(const char* op, const at::Tensor& x, const at::Tensor& clip_max, const at::Tensor& clip_min,
                           const at::Tensor& prev_clip_max, const at::Tensor& prev_clip_min, int64_t num_bits,
                           bool fixed_min) {
  check_clips(op, x, clip_max, clip_min, prev_clip_max, prev_clip_min);
  const std::array<double, 4> values{value_at(clip_max, 0), value_at(clip_min, 0), value_at(prev_clip_max, 0),
                                     value_at(prev_clip_min, 0)};
  const int bits = static_cast<int>(num_bits);
  return is_double(x) ? clips_from<double>(values, bits, fixed_min) : clips_from<float>(values, bits, fixed_min);
}

// The results of such an op: data; scale, offset and effective clips in the type of clip_max; the flag `invalid`.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> ulq_outputs(
    at::Tensor data, const Clips& clips, const at::Tensor& clip_max, bool bad) {
  at::Tensor invalid = new_scalar(at::kBool);
  *static_cast<bool*>(invalid.mutable_data_ptr()) = bad;
  return {std::move(data),
          scalar_like(clip_max, clips.scale),
          scalar_like(clip_max, clips.offset),
          scalar_like(clip_max, clips.high),
          scalar_like(clip_max, clips.low),
          std::move(invalid)};
}

// What the loops of a backward need of the effective clips, in the arithmetic of the data.
template <typename Acc>
UlqBackwardParams backward_params(const at::Tensor& clip_max, const at::Tensor& clip_min, int64_t num_bits) {
  const Acc high = static_cast<Acc>(value_at(clip_max, 0)), low = static_cast<Acc>(value_at(clip_min, 0));
  const auto affine = math::affine(high, low, static_cast<int>(num_bits));
  const math::CodeRange range = math::code_range(static_cast<int>(num_bits));
  return {affine.scale, high, low, affine.scale * (static_cast<Acc>(range.highest) - affine.offset),
          affine.scale * (static_cast<Acc>(range.lowest) - affine.offset)};
}

// The gradients of clip_max and clip_min, 0-dim in their dtypes, from the sums of all blocks in their order.
inline std::tuple<at::Tensor, at::Tensor> clip_gradients(const std::vector<UlqSums>& parts, const at::Tensor& clip_max,
                                                         const at::Tensor& clip_min, int64_t num_bits) {
  UlqSums sums;
  for (const UlqSums& part : parts) {
    sums.rounding_error += part.rounding_error;
    sums.above += part.above;
    sums.below += part.below;
  }
  const double error = sums.rounding_error / static_cast<double>((1LL << num_bits) - 1);
  return {scalar_like(clip_max, error + sums.above), scalar_like(clip_min, sums.below - error)};
}

}  // namespace amct_ext::cpu
