// ulq_clip_gradients and ulq_relu_backward: ulq_fake_quantize_backward in two parts, the second joined with a ReLU.
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/layout.h"
#include "cpu/activation_clips.h"
#include "cpu/parallel.h"
#include "cpu/result_pool.h"
#include "ops/activation_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

// The blocks are those of ulq_fake_quantize_backward, and so are the bits of the sums.
std::tuple<Tensor, Tensor> ulq_clip_gradients(const Tensor& grad, const Tensor& x, const Tensor& clip_max,
                                              const Tensor& clip_min, int64_t num_bits) {
  check_ulq_relu("ulq_clip_gradients", grad, "x", x, std::nullopt, clip_max, clip_min, num_bits);
  const UlqBackwardParams params = backward_params<float>(clip_max, clip_min, num_bits);
  const Tensor source = dense(x), upstream = match_layout(grad, source);
  const float *in = source.const_data_ptr<float>(), *up = upstream.const_data_ptr<float>();
  std::vector<UlqSums> parts(block_count(source.numel()));
  for_blocks(source.numel(), [&](int64_t block, int64_t begin, int64_t end) {
    loops().ulq_clip_sums(up + begin, in + begin, end - begin, params, parts[block]);
  });
  return clip_gradients(parts, clip_max, clip_min, num_bits);
}

Tensor ulq_relu_backward(const Tensor& grad, const Tensor& y, const std::optional<Tensor>& addend,
                         const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits) {
  check_ulq_relu("ulq_relu_backward", grad, "y", y, addend, clip_max, clip_min, num_bits);
  const UlqBackwardParams params = backward_params<float>(clip_max, clip_min, num_bits);
  const Tensor source = dense(y), upstream = match_layout(grad, source),
               more = addend ? match_layout(*addend, source) : Tensor();
  Tensor dx = pooled_like(source, Lifetime::kLayer);
  const float *in = source.const_data_ptr<float>(), *up = upstream.const_data_ptr<float>(),
              *added = addend ? more.const_data_ptr<float>() : nullptr;
  float* out = dx.mutable_data_ptr<float>();
  for_blocks(source.numel(), [&](int64_t, int64_t begin, int64_t end) {
    loops().ulq_relu_backward(up + begin, in + begin, added ? added + begin : nullptr, out + begin, end - begin,
                              params);
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("ulq_clip_gradients", ulq_clip_gradients);
  m.impl("ulq_relu_backward", ulq_relu_backward);
}

}  // namespace amct_ext::cpu
