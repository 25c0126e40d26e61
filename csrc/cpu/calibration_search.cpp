// search_clip_range: one read for extremes and histogram, a second one only if more than one range can still win.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "common/quant_math.h"
#include "cpu/calibration_error_bounds.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

using math::kCandidates;
constexpr double kPercentile = 0.999999;
constexpr int64_t kMinForHistogram = 8192;  // below, trying every range costs less than a histogram
constexpr int64_t kMaxBits = 10;            // above, bins are no finer than steps
constexpr int64_t kChunk = 4096;            // values whose extremes are taken at a time

// Bins for n values: fewer of them are made and searched sooner, more leave fewer ranges to evaluate exactly.
int bin_bits(int64_t n) { return n < (int64_t{1} << 18) ? 13 : kMaxBinBits; }

// The best `rank` values seen, in the order of `Better`. Values of the other sign count as zero.
template <typename Better>
class TopK {
 public:
  explicit TopK(size_t rank) : rank_(rank) {}
  bool admits(double best) const { return heap_.size() < rank_ || Better()(best, heap_.top()); }
  void add(double v) {
    if (!admits(v)) return;
    heap_.push(v);
    if (heap_.size() > rank_) heap_.pop();
  }
  void add(TopK other) {
    for (; !other.heap_.empty(); other.heap_.pop()) add(other.heap_.top());
  }
  double last() const { return heap_.top(); }

 private:
  size_t rank_;
  std::priority_queue<double, std::vector<double>, Better> heap_;
};

// What one thread gathers from its part of the data.
struct Part {
  TopK<std::greater<double>> largest;
  TopK<std::less<double>> smallest;
  Histogram histogram;
  bool finite = true;
};

template <typename T>
void add_top_k(const T* x, int64_t n, Part& part) {
  for (int64_t i = 0; i < n; ++i) {
    const double v = static_cast<double>(x[i]);
    part.largest.add(std::max(v, 0.0));
    part.smallest.add(std::min(v, 0.0));
  }
}

void gather(const Tensor& x, int64_t begin, int64_t end, bool with_histogram, bool extremes_only, Part& part) {
  const Element element = element_of(x);
  const auto range = loops().range_with_zero[element];
  for (int64_t at = begin; at < end && part.finite; at += kChunk) {
    const int64_t n = std::min(kChunk, end - at);
    const char* data = element_ptr(x.const_data_ptr(), at, x.element_size());
    const Range extremes = range(data, n);
    part.finite = math::is_finite(extremes.max) && math::is_finite(extremes.min);
    if (!part.finite) return;
    if (extremes_only) {
      part.largest.add(extremes.max);
      part.smallest.add(extremes.min);
    } else if (part.largest.admits(extremes.max) || part.smallest.admits(extremes.min)) {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "search_clip_range",
                                      [&] { add_top_k(reinterpret_cast<const scalar_t*>(data), n, part); });
    }
    if (with_histogram) {
      part.histogram.add(data, n, element, std::max(std::abs(extremes.max), std::abs(extremes.min)));
    }
  }
}

Part gather(const Tensor& x, bool with_histogram) {
  const int64_t n = x.numel();
  const size_t rank = static_cast<size_t>(n - static_cast<int64_t>(kPercentile * static_cast<double>(n)));
  const Part empty{TopK<std::greater<double>>(rank), TopK<std::less<double>>(rank), Histogram(bin_bits(n)), true};
  const int64_t parts = std::clamp<int64_t>(n / (8 * kBlock), 1, at::get_num_threads());
  std::vector<Part> gathered(parts, empty);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      gather(x, n * p / parts, n * (p + 1) / parts, with_histogram, rank == 1, gathered[p]);
    }
  });
  Part& whole = gathered[0];
  for (int64_t p = 1; p < parts; ++p) {
    whole.largest.add(gathered[p].largest);
    whole.smallest.add(gathered[p].smallest);
    whole.finite = whole.finite && gathered[p].finite;
    if (with_histogram && whole.finite) whole.histogram.add(gathered[p].histogram);
  }
  return std::move(whole);
}

template <typename Acc>
std::vector<Candidate> make_candidates(double largest_, double smallest_, int num_bits, bool with_offset) {
  const Acc largest = static_cast<Acc>(largest_), smallest = static_cast<Acc>(smallest_);
  const auto codes = math::code_range(num_bits);
  const Acc bound = std::max(largest, -smallest);
  const Acc limit = static_cast<Acc>(largest < -smallest ? -codes.lowest : codes.highest);
  std::vector<Candidate> result;
  result.reserve(kCandidates);
  for (const float r : math::kRatios) {
    const Acc ratio = static_cast<Acc>(r);
    if (with_offset) {
      const Acc end = ratio * largest;
      const auto affine = math::affine(end, smallest, num_bits);
      result.push_back({affine.scale, affine.offset, end, codes.lowest, codes.highest});
    } else {
      const Acc end = ratio * bound, scale = end / limit;
      result.push_back({scale < Acc(FLT_EPSILON) ? Acc(1) : scale, 0, end, -static_cast<double>(limit), limit});
    }
  }
  return result;
}

// Indices of the candidates that the histogram does not rule out, in order.
std::vector<int> still_possible(Histogram& histogram, const std::vector<Candidate>& candidates) {
  std::vector<int> all(candidates.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
  // A scale so small that 1 took its place clips everything to zero: bounds know no clip below the highest code.
  if (candidates[0].end < candidates[0].scale) return all;
  histogram.finish();
  if (!histogram.resolves(candidates[0].scale)) return all;
  std::vector<Histogram::Bounds> bounds;
  double best = INFINITY;
  for (const Candidate& candidate : candidates) {
    bounds.push_back(histogram.bounds(candidate, static_cast<int64_t>(candidate.highest)));
    best = std::min(best, bounds.back().high);
  }
  all.erase(std::remove_if(all.begin(), all.end(), [&](int i) { return bounds[i].low > best; }), all.end());
  return all;
}

int first_best(const Tensor& x, const std::vector<Candidate>& candidates, const std::vector<int>& possible,
               bool with_offset) {
  if (possible.size() == 1) return possible[0];
  std::vector<Candidate> tried;
  tried.reserve(possible.size());
  for (int i : possible) tried.push_back(candidates[i]);
  const int count = static_cast<int>(tried.size());
  const auto loop = with_offset ? loops().offset_losses[element_of(x)] : loops().losses[element_of(x)];
  const int64_t n = x.numel();
  std::vector<double> parts((n + kBlock - 1) / kBlock * count, 0.0);
  for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) {
    loop(element_ptr(x.const_data_ptr(), begin, x.element_size()), end - begin, tried.data(), count,
         &parts[block * count]);
  });
  std::vector<double> losses(count, 0.0);
  for (size_t i = 0; i < parts.size(); ++i) losses[i % count] += parts[i];
  return possible[std::min_element(losses.begin(), losses.end()) - losses.begin()];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> search_clip_range(const Tensor& x, int64_t num_bits, bool with_offset) {
  const char* op = "search_clip_range";
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  TORCH_CHECK_VALUE(x.numel() > 0, op, ": x must hold at least one value, shape ", x.sizes(), " has none");
  const Tensor source = dense(x);
  const int bits = static_cast<int>(num_bits);
  const bool with_histogram = !with_offset && x.numel() >= kMinForHistogram && num_bits <= kMaxBits;
  const at::TensorOptions options = x.options().dtype(accumulate_type(x));
  const Tensor like = at::empty({}, options);
  Part part = gather(source, with_histogram);
  if (!part.finite) {
    const auto nan = [&] { return scalar_like(like, NAN); };
    return {nan(), nan(), nan(), nan()};
  }
  const double largest = part.largest.last(), smallest = part.smallest.last();
  const auto candidates = is_double(x) ? make_candidates<double>(largest, smallest, bits, with_offset)
                                       : make_candidates<float>(largest, smallest, bits, with_offset);
  std::vector<int> possible;
  if (with_histogram) {
    possible = still_possible(part.histogram, candidates);
  } else {
    for (int i = 0; i < kCandidates; ++i) possible.push_back(i);
  }
  const Candidate& best = candidates[first_best(source, candidates, possible, with_offset)];
  const auto codes = math::code_range(bits);
  const auto clip = [&](double code) {
    return is_double(x) ? (code - best.offset) * best.scale
                        : static_cast<double>((static_cast<float>(code) - static_cast<float>(best.offset)) *
                                              static_cast<float>(best.scale));
  };
  return {scalar_like(like, best.scale), scalar_like(like, best.offset), scalar_like(like, clip(codes.highest)),
          scalar_like(like, clip(codes.lowest))};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) { m.impl("search_clip_range", search_clip_range); }

}  // namespace amct_ext::cpu
