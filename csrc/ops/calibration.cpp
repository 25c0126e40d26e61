#include "ops/calibration.h"

#include "ops/autograd.h"
#include "ops/typed_op.h"

namespace amct_ext {

TORCH_LIBRARY_FRAGMENT(amct_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "search_clip_range(Tensor x, int num_bits=8, bool with_offset=False) "
      "-> (Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min)",
      tags);
  m.def("range_histogram_(Tensor x, Tensor(a!) histogram, Tensor(b!) extremes) -> ()", tags);
  m.def(
      "search_clip_range_histogram(Tensor histogram, Tensor extremes, int num_bits=8) "
      "-> (Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor excess)",
      tags);
  m.def(
      "search_clip_range_wide(Tensor histogram, Tensor extremes, int num_bits=8, bool fixed_min=False, "
      "bool squared=False) "
      "-> (Tensor clip_max, Tensor clip_min)",
      tags);
  m.def(
      "percentile_clip_range(Tensor histogram, Tensor extremes, float percentile=99.9, int num_bits=8, "
      "bool fixed_min=False) -> (Tensor clip_max, Tensor clip_min)",
      tags);
  m.def("shift_error_(Tensor x, Tensor deq_scale, Tensor(a!) errors, int channel_axis=1) -> ()", tags);
  m.def("best_shift(Tensor errors) -> Tensor", tags);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> search_clip_range(const Tensor& x, int64_t num_bits, bool with_offset) {
  return op<search_clip_range>("search_clip_range").call(x, num_bits, with_offset);
}

void range_histogram_(const Tensor& x, const Tensor& histogram, const Tensor& extremes) {
  op<range_histogram_>("range_histogram_").call(x, histogram, extremes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> search_clip_range_histogram(const Tensor& histogram,
                                                                               const Tensor& extremes,
                                                                               int64_t num_bits) {
  return op<search_clip_range_histogram>("search_clip_range_histogram").call(histogram, extremes, num_bits);
}

std::tuple<Tensor, Tensor> search_clip_range_wide(const Tensor& histogram, const Tensor& extremes, int64_t num_bits,
                                                  bool fixed_min, bool squared) {
  return op<search_clip_range_wide>("search_clip_range_wide").call(histogram, extremes, num_bits, fixed_min, squared);
}

std::tuple<Tensor, Tensor> percentile_clip_range(const Tensor& histogram, const Tensor& extremes, double percentile,
                                                 int64_t num_bits, bool fixed_min) {
  return op<percentile_clip_range>("percentile_clip_range").call(histogram, extremes, percentile, num_bits, fixed_min);
}

void shift_error_(const Tensor& x, const Tensor& deq_scale, const Tensor& errors, int64_t channel_axis) {
  op<shift_error_>("shift_error_").call(x, deq_scale, errors, channel_axis);
}

Tensor best_shift(const Tensor& errors) { return op<best_shift>("best_shift").call(errors); }

TORCH_LIBRARY_IMPL(amct_ext, Autograd, m) {
  without_gradient(m, {"search_clip_range", "range_histogram_", "search_clip_range_histogram", "search_clip_range_wide",
                       "percentile_clip_range", "shift_error_", "best_shift"});
}

}  // namespace amct_ext
