// range_histogram_: exact integer sums, so threads may add their parts in any order.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "common/quant_math.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

// Bins split each power of two evenly, from 2^-24 on.
constexpr int kDroppedBits = 13, kBinsPerOctave = 1 << (23 - kDroppedBits);
constexpr uint32_t kFirstBits = uint32_t{127 - 24} << 23;
constexpr int64_t kBins = int64_t{256} * kBinsPerOctave - (kFirstBits >> kDroppedBits) + 1;
constexpr int64_t kChunk = 4096;                    // values whose range is taken at a time
constexpr int64_t kGrainValues = int64_t{1} << 20;  // values for which a thread with its own histogram pays

// The largest values seen: after trim() exactly as many as at the start, before it some more.
class TopK {
 public:
  explicit TopK(std::vector<float> start) : keep_(static_cast<int64_t>(start.size())), values_(std::move(start)) {
    trim();
  }

  bool admits(float v) const { return v > least_; }
  void add(float v) {
    if (!admits(v)) return;
    values_.push_back(v);
    if (static_cast<int64_t>(values_.size()) >= 2 * keep_ + kChunk) trim();
  }
  const std::vector<float>& values() const { return values_; }
  const std::vector<float>& sorted() {
    trim();
    std::sort(values_.begin(), values_.end(), std::greater<float>());
    return values_;
  }

 private:
  void trim() {
    std::nth_element(values_.begin(), values_.begin() + keep_ - 1, values_.end(), std::greater<float>());
    values_.resize(keep_);
    least_ = values_.back();
  }

  int64_t keep_;
  std::vector<float> values_;
  float least_ = 0;
};

template <typename T>
void add_top_k(const T* x, int64_t n, TopK& largest, TopK& smallest) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(x[i]);
    if (!math::is_finite(v)) continue;
    largest.add(v);
    smallest.add(-v);
  }
}

void range_histogram_(const Tensor& x, const Tensor& histogram, const Tensor& extremes) {
  const char* op = "range_histogram_";
  check_floating(op, "x", x);
  check_type(op, "histogram", histogram, at::kLong);
  check_type(op, "extremes", extremes, at::kFloat);
  const bool with_sign = histogram.dim() == 3;
  TORCH_CHECK_VALUE(
      histogram.sizes() == at::IntArrayRef({kBins, 2}) || histogram.sizes() == at::IntArrayRef({2, kBins, 2}), op,
      ": histogram must have shape (", kBins, ", 2) or (2, ", kBins, ", 2), not ", histogram.sizes());
  TORCH_CHECK_VALUE(extremes.dim() == 2 && extremes.size(0) == 2 && extremes.size(1) > 0, op,
                    ": extremes must have shape (2, k), k at least 1, not ", extremes.sizes());
  const Tensor source = dense(x), whole = histogram.contiguous(), top_k = extremes.contiguous();
  const int64_t n = source.numel(), places = whole.numel(), keep = top_k.size(1);
  float* top = static_cast<float*>(top_k.mutable_data_ptr());
  int64_t* bins = static_cast<int64_t*>(whole.mutable_data_ptr());
  const Element element = element_of(source);
  const int64_t parts = std::clamp<int64_t>(n / kGrainValues, 1, at::get_num_threads());
  const std::vector<float> none(keep);
  std::vector<TopK> largest(parts, TopK(none)), smallest(parts, TopK(none));
  largest[0] = TopK({top, top + keep});
  smallest[0] = TopK({top + keep, top + 2 * keep});
  std::vector<std::vector<int64_t>> partial(parts);  // the first part adds to the result itself
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      partial[p].resize(p == 0 ? 0 : places);
      int64_t* to = p == 0 ? bins : partial[p].data();
      for (int64_t at = n * p / parts, end = n * (p + 1) / parts; at < end; at += kChunk) {
        const int64_t count = std::min(kChunk, end - at);
        const char* data = element_ptr(source.const_data_ptr(), at, source.element_size());
        if (with_sign) {
          loops().signed_range_histogram[element](data, count, kFirstBits, kDroppedBits, to, 2 * kBins);
        } else {
          loops().range_histogram[element](data, count, kFirstBits, kDroppedBits, to);
        }
        const Range range = loops().range_with_zero[element](data, count);
        const bool all_finite = math::is_finite(range.max) && math::is_finite(range.min);
        if (all_finite && !largest[p].admits(static_cast<float>(range.max)) &&
            !smallest[p].admits(static_cast<float>(-range.min))) {
          continue;
        }
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source.scalar_type(), "range_histogram_", [&] {
          add_top_k(reinterpret_cast<const scalar_t*>(data), count, largest[p], smallest[p]);
        });
      }
    }
  });
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t i = 0; i < places; ++i) bins[i] += partial[p][i];
    for (float v : largest[p].values()) largest[0].add(v);
    for (float v : smallest[p].values()) smallest[0].add(v);
  }
  std::copy_n(largest[0].sorted().begin(), keep, top);
  std::copy_n(smallest[0].sorted().begin(), keep, top + keep);
  if (!whole.is_same(histogram)) histogram.copy_(whole);
  if (!top_k.is_same(extremes)) extremes.copy_(top_k);
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) { m.impl("range_histogram_", range_histogram_); }

}  // namespace amct_ext::cpu
