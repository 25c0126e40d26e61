// Weights that are sparse and quantised: masks applied, made and combined with adaptive-range quantisation.
#include <torch/library.h>

#include <tuple>

#include "common/check.h"
#include "cpu/parallel.h"
#include "cpu/result_pool.h"
#include "cpu/sparsity_mask.h"
#include "cpu/weight_arq.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

Tensor apply_mask(const Tensor& w, const Tensor& mask) {
  const char* op = "apply_mask";
  check_floating(op, "w", w);
  check_type(op, "mask", mask, at::kBool);
  check_same_shape(op, "mask", mask, "w", w);
  const Tensor source = dense(w), keep = match_mask_layout(mask, source);
  Tensor y = reused_like(source, Life::kStep);
  const void* in = source.const_data_ptr();
  const uint8_t* bits = static_cast<const uint8_t*>(keep.const_data_ptr());
  void* out = y.mutable_data_ptr();
  const size_t size = w.element_size();
  const auto loop = kernels().apply_mask[element_of(w)];
  for_blocks(w.numel(), [&](int64_t, int64_t begin, int64_t end) {
    loop(at_element(in, begin, size), bits + begin, at_element(out, begin, size), end - begin);
  });
  return y;
}

std::tuple<Tensor, Tensor> sparsify_2to4(const Tensor& w, int64_t axis) {
  const char* op = "sparsify_2to4";
  check_floating(op, "w", w);
  axis = check_axis(op, "axis", w, axis);
  const Tensor source = dense(w);
  Tensor y = reused_like(source, Life::kStep), mask = reused_like(source, Life::kStep, at::kBool);
  make_mask(source, axis, mask, y);
  return {std::move(y), std::move(mask)};
}

// Several rows along axis 0 lie one after the other and hold whole groups of the mask's axis.
bool rows_lie_together(const Tensor& source, std::optional<int64_t> channel_axis, int64_t mask_axis) {
  const AxisView view = channel_axis ? axis_view(source, *channel_axis) : AxisView{0, 0, 0};
  return channel_axis == 0 && mask_axis != 0 && view.outer == 1 && source.size(0) > 1 && source.numel() > 0;
}

std::tuple<Tensor, Tensor> sparse_arq(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                      std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  check_type(op, "mask", mask, at::kBool);
  check_same_shape(op, "mask", mask, "w", w);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  ArqJob job = arq_job(w, mask, channel_axis);
  run_arq({job}, static_cast<int>(num_bits));
  return {std::move(job.y), std::move(job.scale)};
}

std::tuple<Tensor, Tensor, Tensor> sparse_arq_2to4(const Tensor& w, int64_t axis, int64_t num_bits,
                                                   std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize_2to4";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  axis = check_axis(op, "axis", w, axis);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  ArqJob job = arq_job(w, {}, channel_axis);
  const Tensor source = job.source, mask = reused_like(source, Life::kStep, at::kBool);
  job.source = job.y;  // holds what is kept and is quantised where it lies
  if (!rows_lie_together(source, channel_axis, axis)) {
    make_mask(source, axis, mask, job.y);
    run_arq({job}, static_cast<int>(num_bits));
    return {std::move(job.y), std::move(job.scale), mask};
  }
  // A row is masked when it is about to be quantised, so that it stays in the first caches.
  const auto plane = kernels().sparsify_and_range[element_of(w)];
  AxisView view = axis_view(source, axis);
  const int64_t row = source.numel() / source.size(0);
  // One or two weights along the axis are all kept: any cut of the row will do.
  if (view.size <= 2) view = {1, 1, row};
  job.origin = source;
  const void* in = source.const_data_ptr();
  void* out = job.y.mutable_data_ptr();
  uint8_t* keep = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const size_t size = w.element_size();
  const int64_t length = view.size * view.inner;
  job.prepare = [=](int64_t channel) {
    const auto sparsify = [=](int64_t at) {
      return plane(at_element(in, at, size), keep + at, at_element(out, at, size), view.size, view.inner);
    };
    Range range = sparsify(channel * row);
    for (int64_t at = channel * row + length; at < (channel + 1) * row; at += length)
      range = joined(range, sparsify(at));
    return range;
  };
  run_arq({job}, static_cast<int>(num_bits));
  return {std::move(job.y), std::move(job.scale), mask};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("apply_mask", apply_mask);
  m.impl("sparsify_2to4", sparsify_2to4);
  m.impl("sparse_arq_fake_quantize", sparse_arq);
  m.impl("sparse_arq_fake_quantize_2to4", sparse_arq_2to4);
}

}  // namespace amct_ext::cpu
