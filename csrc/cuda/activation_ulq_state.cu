// ulq_fake_quantize_: the activation op, then a kernel of one thread that writes the quantiser's state. It is a launch
// of its own because all blocks of the first kernel read the clips, in no order: a write there would race.
#include <torch/library.h>

#include <tuple>

#include "cuda/activation_ulq.h"
#include "cuda/engine/memory.cuh"
#include "ops/activation_check.h"

namespace amct_ext::cuda {
namespace {

struct QuantiserState {
  ConstScalars used_scale, used_offset, used_clip_max, used_clip_min;
  const bool* found_invalid;
  Scalars clip_max, clip_min, prev_clip_max, prev_clip_min, scale, offset;
  bool* invalid;
};

__global__ void write_state(QuantiserState state) {
  const double high = fetch_and_cast(state.used_clip_max), low = fetch_and_cast(state.used_clip_min);
  cast_and_store(state.clip_max, high);
  cast_and_store(state.clip_min, low);
  cast_and_store(state.prev_clip_max, high);
  cast_and_store(state.prev_clip_min, low);
  cast_and_store(state.scale, fetch_and_cast(state.used_scale));
  cast_and_store(state.offset, fetch_and_cast(state.used_offset));
  if (*state.found_invalid) *state.invalid = true;
}

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min,
                                                      const Tensor& prev_clip_max, const Tensor& prev_clip_min,
                                                      const Tensor& scale, const Tensor& offset, const Tensor& invalid,
                                                      int64_t num_bits, bool fixed_min) {
  check_state("ulq_fake_quantize_", x, scale, offset, invalid);
  auto [y, used_scale, used_offset, used_clip_max, used_clip_min, found_invalid] =
      ulq_fake_quantize(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
  const c10::DeviceGuard guard(x.device());
  const QuantiserState state{const_scalars(used_scale),
                             const_scalars(used_offset),
                             const_scalars(used_clip_max),
                             const_scalars(used_clip_min),
                             static_cast<const bool*>(found_invalid.const_data_ptr()),
                             scalars(clip_max),
                             scalars(clip_min),
                             scalars(prev_clip_max),
                             scalars(prev_clip_min),
                             scalars(scale),
                             scalars(offset),
                             static_cast<bool*>(invalid.mutable_data_ptr())};
  launch(write_state, 1, 1, state);
  return {std::move(y), std::move(used_clip_max), std::move(used_clip_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) { m.impl("ulq_fake_quantize_", ulq_fake_quantize_); }

}  // namespace amct_ext::cuda
