// Weights that are sparse and quantised: masks applied, made and combined with adaptive-range quantisation.
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/mask.h"
#include "cpu/tensors.h"
#include "cpu/weights.h"
#include "quant_math.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

Tensor apply_mask(const Tensor& w, const Tensor& mask) {
  const char* op = "apply_mask";
  check_floating(op, "w", w);
  check_type(op, "mask", mask, at::kBool);
  check_same_shape(op, "mask", mask, "w", w);
  const Tensor source = without_holes(w), keep = mask_laid_out_as(mask, source);
  Tensor y = at::empty_like(source);
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
  const Tensor source = without_holes(w);
  Tensor y = at::empty_like(source), mask = at::empty_like(source, source.options().dtype(at::kBool));
  make_mask(source, axis, mask, y);
  return {std::move(y), std::move(mask)};
}

// A row of the weight at a time, all in the first-level caches: masked into a scratch row, its range, its codes.
// `row_mask` fills the scratch row (and the mask, where it is made here).
template <typename F>
void quantize_rows(const Tensor& y, const Tensor& scale, int num_bits, const F& masked_row) {
  const auto codes = math::code_range(num_bits);
  const Element element = element_of(y);
  const size_t size = y.element_size();
  const int64_t rows = y.size(0), length = y.numel() / rows;
  const auto range = kernels().range[element];
  const auto quantize = kernels().quantize[element];
  void* out = y.mutable_data_ptr();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain * kBlock / length), [&](int64_t first, int64_t last) {
    // Not initialised: every row is filled before it is read.
    const std::unique_ptr<char[]> scratch(new char[length * size]);
    for (int64_t row = first; row < last; ++row) {
      masked_row(row * length, length, scratch.get());
      const Symmetric symmetric{scale_of(range(scratch.get(), length), num_bits, wide(y)), codes.lowest, codes.highest};
      quantize(scratch.get(), at_element(out, row * length, size), length, symmetric);
      set_value(scale, row, symmetric.scale);
    }
  });
}

// Rows along axis 0 lie one after the other and hold whole groups of the mask's axis.
bool rows_lie_together(const Tensor& source, std::optional<int64_t> channel_axis, int64_t mask_axis) {
  const Runs runs = channel_axis ? runs_along(source, *channel_axis) : Runs{0, 0, 0};
  return channel_axis == 0 && mask_axis != 0 && runs.outer == 1 && source.size(0) > 0 && source.numel() > 0;
}

std::tuple<Tensor, Tensor> sparse_arq(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                      std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  check_type(op, "mask", mask, at::kBool);
  check_same_shape(op, "mask", mask, "w", w);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  const int bits = static_cast<int>(num_bits);
  const Tensor source = without_holes(w), keep = mask_laid_out_as(mask, source);
  Tensor y = at::empty_like(source);
  Tensor scale = at::empty({channel_axis ? w.size(*channel_axis) : 1}, w.options().dtype(accumulate_type(w)));
  if (w.numel() == 0) return {std::move(y), scale.fill_(1)};
  if (!rows_lie_together(source, channel_axis, 1)) {
    range_and_quantize(apply_mask(source, keep), y, scale, bits, channel_axis);
    return {std::move(y), std::move(scale)};
  }
  const auto apply = kernels().apply_mask[element_of(w)];
  const void* in = source.const_data_ptr();
  const uint8_t* kept = static_cast<const uint8_t*>(keep.const_data_ptr());
  const size_t size = w.element_size();
  quantize_rows(y, scale, bits,
                [&](int64_t begin, int64_t n, void* row) { apply(at_element(in, begin, size), kept + begin, row, n); });
  return {std::move(y), std::move(scale)};
}

std::tuple<Tensor, Tensor, Tensor> sparse_arq_2to4(const Tensor& w, int64_t axis, int64_t num_bits,
                                                   std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize_2to4";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  axis = check_axis(op, "axis", w, axis);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  const int bits = static_cast<int>(num_bits);
  const Tensor source = without_holes(w);
  Tensor y = at::empty_like(source), mask = at::empty_like(source, source.options().dtype(at::kBool));
  Tensor scale = at::empty({channel_axis ? w.size(*channel_axis) : 1}, w.options().dtype(accumulate_type(w)));
  if (w.numel() == 0) return {std::move(y), scale.fill_(1), std::move(mask)};
  if (!rows_lie_together(source, channel_axis, axis)) {
    const Tensor kept = at::empty_like(source);
    make_mask(source, axis, mask, kept);
    range_and_quantize(kept, y, scale, bits, channel_axis);
    return {std::move(y), std::move(scale), std::move(mask)};
  }
  const auto plane = kernels().mask_plane[element_of(w)];
  Runs runs = runs_along(source, axis);
  // One or two weights along the axis are all kept: any cut of the row will do.
  if (runs.count <= 2) runs = {1, 1, source.numel() / source.size(0)};
  const void* in = source.const_data_ptr();
  uint8_t* keep = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const size_t size = w.element_size();
  const int64_t length = runs.count * runs.inner;
  quantize_rows(y, scale, bits, [&](int64_t begin, int64_t n, void* row) {
    for (int64_t at = 0; at < n; at += length) {
      plane({at_element(in, begin + at, size), keep + begin + at, at_element(row, at, size), runs.count, runs.inner});
    }
  });
  return {std::move(y), std::move(scale), std::move(mask)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_many(at::TensorList weights, int64_t num_bits,
                                                              at::IntArrayRef channel_axes) {
  const char* op = "arq_fake_quantize_many";
  check_bits(op, num_bits);
  TORCH_CHECK_VALUE(channel_axes.size() == weights.size(), op,
                    ": channel_axes must hold one axis (-1 for none) for each of ", weights.size(), " weights, not ",
                    channel_axes.size());
  std::vector<Tensor> ys, scales;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_floating(op, "a weight", w);
    std::optional<int64_t> axis;
    if (channel_axes[i] >= 0) axis = check_axis(op, "channel axis", w, channel_axes[i]);
    const Tensor source = without_holes(w);
    ys.push_back(at::empty_like(source));
    scales.push_back(at::empty({axis ? w.size(*axis) : 1}, w.options().dtype(accumulate_type(w))));
    if (w.numel() == 0) {
      scales.back().fill_(1);
    } else {
      range_and_quantize(source, ys.back(), scales.back(), static_cast<int>(num_bits), axis);
    }
  }
  return {std::move(ys), std::move(scales)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("apply_mask", apply_mask);
  m.impl("sparsify_2to4", sparsify_2to4);
  m.impl("sparse_arq_fake_quantize", sparse_arq);
  m.impl("sparse_arq_fake_quantize_2to4", sparse_arq_2to4);
  m.impl("arq_fake_quantize_many", arq_many);
}

}  // namespace amct_ext::cpu
