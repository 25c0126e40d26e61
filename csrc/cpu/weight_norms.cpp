// filter_norms: the L2 norm of each slice along an axis.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "common/check.h"
#include "cpu/per_channel.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

Tensor filter_norms(const Tensor& w, int64_t axis) {
  const char* op = "filter_norms";
  check_floating(op, "w", w);
  axis = check_axis(op, "axis", w, axis);
  const Tensor source = dense(w);
  const void* in = source.const_data_ptr();
  const size_t size = w.element_size();
  const auto loop = loops().sum_squares[element_of(w)];
  std::vector<double> sums = channel_sums(axis_view(source, axis), [&](int64_t, int64_t begin, int64_t n) {
    return loop(element_ptr(in, begin, size), n);
  });
  for (double& sum : sums) sum = std::sqrt(sum);
  return tensor_of(sums, {w.size(axis)}, w.options().dtype(accumulate_type(w)));
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) { m.impl("filter_norms", filter_norms); }

}  // namespace amct_ext::cpu
