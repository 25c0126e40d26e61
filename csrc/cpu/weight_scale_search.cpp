// search_weight_scale: the scale of least squared error of each channel.
#include <torch/library.h>

#include <array>
#include <vector>

#include "common/quant_math.h"
#include "cpu/gather_rows.h"
#include "cpu/per_channel.h"
#include "cpu/tensor_access.h"
#include "cpu/weight_arq.h"
#include "ops/sparsity_check.h"
#include "ops/weight_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

// Of each scale that is tried: the sums of weight times code and of code squared.
using Fits = std::array<double, 2 * math::kScaleFactors>;

// The weight, and the loops for its element type.
class ScaleSearch {
 public:
  ScaleSearch(const Tensor& source, const Tensor& mask, int num_bits)
      : element_(element_of(source)),
        size_(source.element_size()),
        num_bits_(num_bits),
        in_(source.const_data_ptr()),
        mask_(mask.defined() ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr) {}

  Range range(const void* in, const uint8_t* mask, int64_t n) const {
    return mask ? loops().masked_range[element_](in, mask, n) : loops().range[element_](in, n);
  }
  Range range_at(int64_t begin, int64_t n) const { return range(element_ptr(in_, begin, size_), mask_at(begin), n); }

  void add_fits(const void* in, const uint8_t* mask, int64_t n, double range_scale, Fits& fits) const {
    const auto codes = math::code_range(num_bits_);
    loops().scale_fits[element_](in, mask, n, {range_scale, codes.lowest, codes.highest}, fits.data());
  }
  void add_fits_at(int64_t begin, int64_t n, double range_scale, Fits& fits) const {
    add_fits(element_ptr(in_, begin, size_), mask_at(begin), n, range_scale, fits);
  }

  double range_scale(Range range) const {
    if (element_ == kFloat64) return math::symmetric_scale(range.max, range.min, num_bits_);
    return static_cast<double>(
        math::symmetric_scale(static_cast<float>(range.max), static_cast<float>(range.min), num_bits_));
  }

  GatherInput weights() const { return {in_, size_}; }
  GatherInput mask() const { return {mask_, 1}; }

 private:
  const uint8_t* mask_at(int64_t begin) const { return mask_ ? mask_ + begin : nullptr; }

  Element element_;
  size_t size_;
  int num_bits_;
  const void* in_;
  const uint8_t* mask_;
};

double per_tensor(const ScaleSearch& search, int64_t n) {
  std::vector<Range> ranges(block_count(n));
  for_blocks(n,
             [&](int64_t block, int64_t begin, int64_t end) { ranges[block] = search.range_at(begin, end - begin); });
  Range all = ranges[0];
  for (const Range& range : ranges) all = merge(all, range);
  const double scale = search.range_scale(all);
  if (!math::is_finite(scale)) return scale;
  std::vector<Fits> parts(block_count(n));
  for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) {
    parts[block] = {};
    search.add_fits_at(begin, end - begin, scale, parts[block]);
  });
  Fits fits = {};
  for (const Fits& part : parts) {
    for (size_t i = 0; i < fits.size(); ++i) fits[i] += part[i];
  }
  return math::best_scale(fits.data(), scale);
}

double of_channel(const ScaleSearch& search, const AxisView& view, int64_t channel) {
  const auto start = [&](int64_t outer) { return (outer * view.size + channel) * view.inner; };
  Range range = search.range_at(start(0), view.inner);
  for (int64_t o = 1; o < view.outer; ++o) range = merge(range, search.range_at(start(o), view.inner));
  const double scale = search.range_scale(range);
  if (!math::is_finite(scale)) return scale;
  Fits fits = {};
  for (int64_t o = 0; o < view.outer; ++o) search.add_fits_at(start(o), view.inner, scale, fits);
  return math::best_scale(fits.data(), scale);
}

double of_row(const ScaleSearch& search, const void* row, const uint8_t* mask, int64_t n) {
  const double scale = search.range_scale(search.range(row, mask, n));
  if (!math::is_finite(scale)) return scale;
  Fits fits = {};
  search.add_fits(row, mask, n, scale, fits);
  return math::best_scale(fits.data(), scale);
}

Tensor search_weight_scale(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis,
                           const std::optional<Tensor>& mask) {
  const char* op = "search_weight_scale";
  channel_axis = check_weight(op, w, num_bits, channel_axis, 8);
  if (mask) check_mask(op, *mask, w);
  const Tensor source = dense(w), keep = mask ? match_mask_layout(*mask, source) : Tensor();
  std::vector<double> scales(channel_axis ? w.size(*channel_axis) : 1, 1.0);
  const AxisView view = axis_view(source, channel_axis);
  const ScaleSearch search(source, keep, static_cast<int>(num_bits));
  if (w.numel() == 0) {
    // No weight, no range: a scale of one.
  } else if (view.size == 1) {
    scales[0] = per_tensor(search, view.outer * view.inner);
  } else if (has_short_runs(view)) {
    for_gathered_rows<2>(view, {{search.weights(), search.mask()}}, nullptr, 0,
                         [&](int64_t channel, const auto& row, char*, int64_t n) {
                           scales[channel] = of_row(search, row[0], reinterpret_cast<const uint8_t*>(row[1]), n);
                         });
  } else {
    for_rows(view.size, math::kScaleFactors * view.outer * view.inner,
             [&](int64_t channel) { scales[channel] = of_channel(search, view, channel); });
  }
  return tensor_of(scales, {static_cast<int64_t>(scales.size())}, w.options().dtype(accumulate_type(w)));
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) { m.impl("search_weight_scale", search_weight_scale); }

}  // namespace amct_ext::cpu
