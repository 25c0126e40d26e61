// ulq_fake_quantize_: the activation op, then the writes to a quantiser's state by one thread. Writing the clips in the
// kernel that reads them would race: its blocks read them at different times.
#include <torch/library.h>

#include <tuple>

#include "cuda/activation_ulq.h"
#include "cuda/engine/launch.cuh"
#include "ops/activation_check.h"

namespace amct_ext::cuda {
namespace {

struct State {
  Value used_scale, used_offset, used_max, used_min;
  const bool* found_invalid;
  Result clip_max, clip_min, prev_clip_max, prev_clip_min, scale, offset;
  bool* invalid;
};

__global__ void write_state(State state) {
  const double high = read(state.used_max), low = read(state.used_min);
  write(state.clip_max, high);
  write(state.clip_min, low);
  write(state.prev_clip_max, high);
  write(state.prev_clip_min, low);
  write(state.scale, read(state.used_scale));
  write(state.offset, read(state.used_offset));
  if (*state.found_invalid) *state.invalid = true;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min,
                                           const Tensor& prev_clip_max, const Tensor& prev_clip_min,
                                           const Tensor& scale, const Tensor& offset, const Tensor& invalid,
                                           int64_t num_bits, bool fixed_min) {
  check_state("ulq_fake_quantize_", x, scale, offset, invalid);
  auto [y, used_scale, used_offset, used_max, used_min, found_invalid] =
      ulq_forward(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
  const c10::DeviceGuard guard(x.device());
  const State state{value_of(used_scale),
                    value_of(used_offset),
                    value_of(used_max),
                    value_of(used_min),
                    static_cast<const bool*>(found_invalid.const_data_ptr()),
                    result_of(clip_max),
                    result_of(clip_min),
                    result_of(prev_clip_max),
                    result_of(prev_clip_min),
                    result_of(scale),
                    result_of(offset),
                    static_cast<bool*>(invalid.mutable_data_ptr())};
  launch(write_state, 1, 1, state);
  return {std::move(y), std::move(used_max), std::move(used_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) { m.impl("ulq_fake_quantize_", forward); }

}  // namespace amct_ext::cuda
