// quantize_weight: the INT8 codes of a weight under given scales.
#include <torch/library.h>

#include "cuda/weight_quantize.cuh"
#include "ops/weight_check.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

Tensor quantize_weight(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  channel_axis = check_scaled_weight("quantize_weight", w, scale, num_bits, channel_axis, 8);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), scales = scale.contiguous();
  Tensor y = at::empty_like(source, source.options().dtype(at::kChar));
  if (w.numel() == 0) return y;
  dispatch_floating(w.scalar_type(), [&]<typename T>() {
    launch_quantize<T, int8_t>(source, nullptr, y, scales, axis_view(source, channel_axis), Acc<T>(FLT_EPSILON),
                               static_cast<int>(num_bits));
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) { m.impl("quantize_weight", quantize_weight); }

}  // namespace amct_ext::cuda
