// repair_weight_scale_: learned scales that would cost their channel.
#include <torch/library.h>

#include <array>
#include <vector>

#include "cpu/gather_rows.h"
#include "cpu/per_channel.h"
#include "cpu/weight_arq.h"
#include "cpu/weight_scales.h"
#include "ops/weight_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

// Of a channel: the sums of squares of its weights before and after quantising.
using Squares = std::array<double, 2>;

template <typename Loop>
std::vector<Squares> squares_of(const AxisView& view, const void* in, size_t size, const Loop& loop) {
  std::vector<Squares> sums(view.size, Squares{});
  if (view.size == 1) {
    const int64_t n = view.outer * view.inner;
    std::vector<Squares> parts(block_count(n), Squares{});
    for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) {
      loop(0, element_ptr(in, begin, size), end - begin, parts[block].data());
    });
    for (const Squares& part : parts) {
      sums[0][0] += part[0];
      sums[0][1] += part[1];
    }
  } else if (has_short_runs(view)) {
    for_gathered_rows<1>(view, {{{in, size}}}, nullptr, 0, [&](int64_t channel, const auto& row, char*, int64_t n) {
      loop(channel, row[0], n, sums[channel].data());
    });
  } else {
    for_channel_runs(view, [&](int64_t channel, int64_t begin, int64_t n) {
      loop(channel, element_ptr(in, begin, size), n, sums[channel].data());
    });
  }
  return sums;
}

double scale_of_range(const AxisView& view, const Tensor& source, int64_t channel, int num_bits, double scale) {
  const auto loop = loops().range[element_of(source)];
  const auto range_at = [&](int64_t outer) {
    const int64_t begin = (outer * view.size + channel) * view.inner;
    return loop(element_ptr(source.const_data_ptr(), begin, source.element_size()), view.inner);
  };
  Range range = range_at(0);
  for (int64_t o = 1; o < view.outer; ++o) range = merge(range, range_at(o));
  if (is_double(source)) return math::repaired_scale(range.max, range.min, num_bits, scale);
  return math::repaired_scale(static_cast<float>(range.max), static_cast<float>(range.min), num_bits, scale);
}

void repair_weight_scale(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  const char* op = "repair_weight_scale_";
  channel_axis = check_scaled_weight(op, w, scale, num_bits, channel_axis, 8);
  if (w.numel() == 0) return;
  const auto codes = math::code_range(static_cast<int>(num_bits));
  const std::vector<double> scales = floored_scales(scale, w);
  const Tensor source = dense(w);
  const AxisView view = axis_view(source, channel_axis);
  const auto loop = loops().squares_left[element_of(w)];
  const std::vector<Squares> squares = squares_of(view, source.const_data_ptr(), w.element_size(),
                                                  [&](int64_t channel, const void* in, int64_t n, double* sums) {
                                                    loop(in, n, {scales[channel], codes.lowest, codes.highest}, sums);
                                                  });
  const Tensor written = scale.is_contiguous() ? scale : scale.contiguous();
  bool any = false;
  for (int64_t c = 0; c < view.size; ++c) {
    if (!math::channel_is_lost(squares[c][0], squares[c][1])) continue;
    set_value(written, c, scale_of_range(view, source, c, static_cast<int>(num_bits), value_at(written, c)));
    any = true;
  }
  if (any && !written.is_same(scale)) scale.copy_(written);
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) { m.impl("repair_weight_scale_", repair_weight_scale); }

}  // namespace amct_ext::cpu
