// Weights that are sparse and quantised: masks applied, made and combined with adaptive-range quantisation.
#include <torch/library.h>

#include <tuple>

#include "cpu/parallel.h"
#include "cpu/result_pool.h"
#include "cpu/sparsity_mask.h"
#include "cpu/tensor_access.h"
#include "cpu/weight_arq.h"
#include "ops/sparsity_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

Tensor apply_mask(const Tensor& w, const Tensor& mask) {
  const char* op = "apply_mask";
  check_floating(op, "w", w);
  check_mask(op, mask, w);
  const Tensor source = dense(w), keep = match_mask_layout(mask, source);
  Tensor y = pooled_like(source, Lifetime::kStep);
  const void* in = source.const_data_ptr();
  const uint8_t* bits = static_cast<const uint8_t*>(keep.const_data_ptr());
  void* out = y.mutable_data_ptr();
  const size_t size = w.element_size();
  const auto loop = loops().apply_mask[element_of(w)];
  for_blocks(w.numel(), [&](int64_t, int64_t begin, int64_t end) {
    loop(element_ptr(in, begin, size), bits + begin, element_ptr(out, begin, size), end - begin);
  });
  return y;
}

Tensor apply_mask_sr_ste(const Tensor& w, const Tensor& mask, double decay) {
  check_decaying("apply_mask_sr_ste", w, mask, decay);
  return apply_mask(w, mask);
}

Tensor sr_ste_backward(const Tensor& grad, const Tensor& w, const Tensor& mask, double decay) {
  check_decaying_backward("sr_ste_backward", grad, w, mask, decay);
  const Tensor upstream = dense(grad), source = match_layout(w, upstream), keep = match_mask_layout(mask, upstream);
  Tensor d_w = pooled_like(upstream, Lifetime::kStep);
  const void *up = upstream.const_data_ptr(), *in = source.const_data_ptr();
  const uint8_t* bits = static_cast<const uint8_t*>(keep.const_data_ptr());
  void* out = d_w.mutable_data_ptr();
  const size_t size = w.element_size();
  const auto loop = loops().sr_ste_backward[element_of(w)];
  for_blocks(w.numel(), [&](int64_t, int64_t begin, int64_t end) {
    loop(element_ptr(up, begin, size), element_ptr(in, begin, size), bits + begin, element_ptr(out, begin, size),
         end - begin, decay);
  });
  return d_w;
}

std::tuple<Tensor, Tensor> sparsify_2to4(const Tensor& w, int64_t axis) {
  const char* op = "sparsify_2to4";
  check_floating(op, "w", w);
  axis = check_axis(op, "axis", w, axis);
  const Tensor source = dense(w);
  Tensor y = pooled_like(source, Lifetime::kStep), mask = pooled_like(source, Lifetime::kStep, at::kBool);
  make_mask(source, axis, mask, y);
  return {std::move(y), std::move(mask)};
}

// Whether there are several channels along axis 0, each contiguous and with whole groups of the mask's axis.
bool rows_are_contiguous(const Tensor& source, std::optional<int64_t> channel_axis, int64_t mask_axis) {
  return channel_axis == 0 && mask_axis != 0 && axis_view(source, 0).outer == 1 && source.size(0) > 1 &&
         source.numel() > 0;
}

int64_t address_of(const Tensor& t) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.const_data_ptr())); }

// The mask of `source` and the quantised weights in job.y, a row at a time: each row is masked just before it is
// quantised, so that it is still in the L1 or L2 cache.
void mask_and_quantize_rows(const Tensor& source, int64_t axis, const Tensor& mask, const ArqJob& job, int num_bits) {
  const auto sparsify_and_range = loops().sparsify_and_range[element_of(source)];
  const int64_t rows = source.size(0), row = source.numel() / rows;
  AxisView view = axis_view(source, axis);
  // One or two weights along the axis are all kept, however the row is split.
  if (view.size <= 2) view = {1, 1, row};
  const int64_t plane = view.size * view.inner, size = source.element_size();
  const void* in = source.const_data_ptr();
  void* out = job.y.mutable_data_ptr();
  uint8_t* keep = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const auto sparsify = [&](int64_t at) {
    return sparsify_and_range(element_ptr(in, at, size), keep + at, element_ptr(out, at, size), view.size, view.inner);
  };
  const ArqWeight weight(job, num_bits);
  const int64_t to_source = address_of(source) - address_of(job.y);
  for_rows(rows, row, [&](int64_t channel) {
    const int64_t begin = channel * row;
    Range range = sparsify(begin);
    for (int64_t at = begin + plane; at < begin + row; at += plane) range = merge(range, sparsify(at));
    weight.quantize_channel(channel, range, to_source);
  });
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                                    std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  check_mask(op, mask, w);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  ArqJob job = arq_job(w, mask, channel_axis);
  arq_quantize({job}, static_cast<int>(num_bits));
  return {std::move(job.y), std::move(job.scale)};
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize_sr_ste(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                                           std::optional<int64_t> channel_axis, double decay) {
  check_decaying("sparse_arq_fake_quantize_sr_ste", w, mask, decay);
  return sparse_arq_fake_quantize(w, mask, num_bits, channel_axis);
}

std::tuple<Tensor, Tensor, Tensor> sparse_arq_fake_quantize_2to4(const Tensor& w, int64_t axis, int64_t num_bits,
                                                                 std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize_2to4";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  axis = check_axis(op, "axis", w, axis);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  ArqJob job = arq_job(w, {}, channel_axis);
  const int bits = static_cast<int>(num_bits);
  const Tensor source = job.source, mask = pooled_like(source, Lifetime::kStep, at::kBool);
  job.source = job.y;  // holds the weights that are kept and is quantised in place
  if (rows_are_contiguous(source, channel_axis, axis)) {
    mask_and_quantize_rows(source, axis, mask, job, bits);
  } else {
    make_mask(source, axis, mask, job.y);
    arq_quantize({job}, bits);
  }
  return {std::move(job.y), std::move(job.scale), mask};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("apply_mask", apply_mask);
  m.impl("sparsify_2to4", sparsify_2to4);
  m.impl("sparse_arq_fake_quantize", sparse_arq_fake_quantize);
  m.impl("sparse_arq_fake_quantize_2to4", sparse_arq_fake_quantize_2to4);
  m.impl("apply_mask_sr_ste", apply_mask_sr_ste);
  m.impl("sparse_arq_fake_quantize_sr_ste", sparse_arq_fake_quantize_sr_ste);
  m.impl("sr_ste_backward", sr_ste_backward);
}

}  // namespace amct_ext::cpu
