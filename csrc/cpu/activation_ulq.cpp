// ulq_fake_quantize and its backward.
#include <ATen/ops/gt.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/masked_fill.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "common/layout.h"
#include "common/quant_math.h"
#include "cpu/activation_clips.h"
#include "cpu/result_pool.h"
#include "cpu/strided_runs.h"
#include "ops/activation_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_fake_quantize(const Tensor& x, const Tensor& clip_max,
                                                                             const Tensor& clip_min,
                                                                             const Tensor& prev_clip_max,
                                                                             const Tensor& prev_clip_min,
                                                                             int64_t num_bits, bool fixed_min) {
  const char* op = "ulq_fake_quantize";
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  const Clips clips = resolve_clips(op, x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
  const UlqForwardParams params = clips.params(num_bits);

  const Tensor source = coalesced(x);
  Tensor y = pooled_like(source, Lifetime::kLayer);
  std::atomic<bool> bad{!clips.valid()};
  const void* in = source.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const size_t size = x.element_size();
  const auto loop = loops().ulq_forward[element_of(x)];
  for_strided_runs(StridedRuns(x.sizes(), source.strides(), y.strides()),
                   [&](int64_t, int64_t from, int64_t to, int64_t n) {
                     if (loop(element_ptr(in, from, size), element_ptr(out, to, size), n, params)) {
                       bad.store(true, std::memory_order_relaxed);
                     }
                   });
  return ulq_outputs(std::move(y), clips, clip_max, bad.load());
}

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                              const Tensor& clip_max, const Tensor& clip_min,
                                                              int64_t num_bits) {
  check_ulq_backward("ulq_fake_quantize_backward", grad, x, clip_max, clip_min, num_bits);
  const UlqBackwardParams params = is_double(x) ? backward_params<double>(clip_max, clip_min, num_bits)
                                                : backward_params<float>(clip_max, clip_min, num_bits);

  const Tensor source = coalesced(to_type(x, common_type(grad, x)));
  Tensor dx = pooled_like(source, Lifetime::kLayer);
  const Tensor upstream = match_layout(grad, dx);
  const StridedRuns runs(x.sizes(), source.strides(), dx.strides());
  std::vector<UlqSums> parts(runs.blocks());
  const void *in = source.const_data_ptr(), *up = upstream.const_data_ptr();
  void* out = dx.mutable_data_ptr();
  const size_t size = source.element_size();
  const auto loop = loops().ulq_backward[element_of(source)];
  for_strided_runs(runs, [&](int64_t block, int64_t from, int64_t to, int64_t n) {
    loop(element_ptr(up, to, size), element_ptr(in, from, size), element_ptr(out, to, size), n, params, parts[block]);
  });
  if (is_double(grad) && !is_double(x)) {  // the loop has rounded the gradient
    const c10::NoGradGuard no_graph;
    dx = at::empty_like(dx, at::kDouble).copy_(grad);
    dx.masked_fill_(source.gt(params.upper).logical_or_(source.lt(params.lower)), 0);
  } else {
    dx = to_type(dx, grad.scalar_type());
  }
  auto [d_max, d_min] = clip_gradients(parts, clip_max, clip_min, num_bits);
  return {std::move(dx), std::move(d_max), std::move(d_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("ulq_fake_quantize", ulq_fake_quantize);
  m.impl("ulq_fake_quantize_backward", ulq_fake_quantize_backward);
}

}  // namespace amct_ext::cpu
