// range_histogram_: exact integer sums, so threads may add their parts in any order.
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/quant_math.h"
#include "cpu/parallel.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

constexpr int kCut = 13, kPerOctave = 1 << (23 - kCut);
constexpr uint32_t kFirst = uint32_t{127 - 24} << 23;
constexpr int64_t kBins = int64_t{256} * kPerOctave - (kFirst >> kCut) + 1;
constexpr int64_t kPiece = 4096;
constexpr int64_t kShare = int64_t{1} << 20;  // values for which a histogram of its own pays for a thread

// The largest values seen, at least `keep` of them: those that beat the smallest one kept so far.
class Tops {
 public:
  explicit Tops(std::vector<float> start) : keep_(static_cast<int64_t>(start.size())), values_(std::move(start)) {
    cut();
  }

  bool admits(float v) const { return v > least_; }
  void add(float v) {
    if (!admits(v)) return;
    values_.push_back(v);
    if (static_cast<int64_t>(values_.size()) >= 2 * keep_ + kPiece) cut();
  }
  const std::vector<float>& found() const { return values_; }
  const std::vector<float>& sorted() {
    cut();
    std::sort(values_.begin(), values_.end(), std::greater<float>());
    return values_;
  }

 private:
  void cut() {
    std::nth_element(values_.begin(), values_.begin() + keep_ - 1, values_.end(), std::greater<float>());
    values_.resize(keep_);
    least_ = values_.back();
  }

  int64_t keep_;
  std::vector<float> values_;
  float least_ = 0;
};

template <typename T>
void add_tops(const T* x, int64_t n, Tops& largest, Tops& smallest) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(x[i]);
    if (!math::is_finite(v)) continue;
    largest.add(v);
    smallest.add(-v);
  }
}

void range_histogram(const Tensor& x, const Tensor& histogram, const Tensor& extremes) {
  const char* op = "range_histogram_";
  check_floating(op, "x", x);
  check_type(op, "histogram", histogram, at::kLong);
  check_type(op, "extremes", extremes, at::kFloat);
  TORCH_CHECK_VALUE(histogram.dim() == 2 && histogram.size(0) == kBins && histogram.size(1) == 2, op,
                    ": histogram must have shape (", kBins, ", 2), not ", histogram.sizes());
  TORCH_CHECK_VALUE(extremes.dim() == 2 && extremes.size(0) == 2 && extremes.size(1) > 0, op,
                    ": extremes must have shape (2, k), k at least 1, not ", extremes.sizes());
  const Tensor source = dense(x), whole = histogram.contiguous(), tops = extremes.contiguous();
  const int64_t n = source.numel(), keep = tops.size(1);
  float* top = static_cast<float*>(tops.mutable_data_ptr());
  int64_t* bins = static_cast<int64_t*>(whole.mutable_data_ptr());
  const Element element = element_of(source);
  const int64_t parts = std::clamp<int64_t>(n / kShare, 1, at::get_num_threads());
  const std::vector<float> none(keep);
  std::vector<Tops> largest(parts, Tops(none)), smallest(parts, Tops(none));
  largest[0] = Tops({top, top + keep});
  smallest[0] = Tops({top + keep, top + 2 * keep});
  std::vector<std::vector<int64_t>> own(parts);  // the first part adds to the result itself
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      own[p].resize(p == 0 ? 0 : 2 * kBins);
      int64_t* to = p == 0 ? bins : own[p].data();
      for (int64_t at = n * p / parts, end = n * (p + 1) / parts; at < end; at += kPiece) {
        const int64_t count = std::min(kPiece, end - at);
        const char* data = at_element(source.const_data_ptr(), at, source.element_size());
        kernels().octaves[element](data, count, kFirst, kCut, to);
        const Range range = kernels().extremes[element](data, count);
        const bool seen = math::is_finite(range.largest) && math::is_finite(range.smallest);
        if (seen && !largest[p].admits(static_cast<float>(range.largest)) &&
            !smallest[p].admits(static_cast<float>(-range.smallest))) {
          continue;
        }
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source.scalar_type(), "range_histogram_", [&] {
          add_tops(reinterpret_cast<const scalar_t*>(data), count, largest[p], smallest[p]);
        });
      }
    }
  });
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t i = 0; i < 2 * kBins; ++i) bins[i] += own[p][i];
    for (float v : largest[p].found()) largest[0].add(v);
    for (float v : smallest[p].found()) smallest[0].add(v);
  }
  std::copy_n(largest[0].sorted().begin(), keep, top);
  std::copy_n(smallest[0].sorted().begin(), keep, top + keep);
  if (!whole.is_same(histogram)) histogram.copy_(whole);
  if (!tops.is_same(extremes)) extremes.copy_(tops);
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) { m.impl("range_histogram_", range_histogram); }

}  // namespace amct_ext::cpu
