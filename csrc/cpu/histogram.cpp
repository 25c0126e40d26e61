#include "cpu/histogram.h"

#include <algorithm>
#include <cmath>

namespace amct_ext::cpu {

void Histogram::cover(double largest) {
  if (packed_.empty()) {
    packed_.resize(kBins);
    counts_.resize(kBins);
    sums_.resize(kBins);
  }
  int needed = 0;
  std::frexp(largest, &needed);  // largest < 2^needed
  if (needed <= exponent_) return;
  empty();
  if (total_ == 0) exponent_ = needed;
  while (exponent_ < needed) widen();
}

// Twice the range: every two bins become one.
void Histogram::widen() {
  constexpr uint64_t full = uint64_t{1} << kFractionBits;
  for (int64_t bin = 0; bin < kBins; ++bin) {
    const int64_t even = 2 * bin, odd = even + 1;
    const bool inside = odd < kBins;
    const uint64_t count = inside ? counts_[even] + counts_[odd] : 0;
    const uint64_t sum = inside ? (sums_[even] + sums_[odd] + counts_[odd] * full) / 2 : 0;
    counts_[bin] = count;
    sums_[bin] = sum;
  }
  ++exponent_;
}

void Histogram::empty() {
  if (pending_ == 0) return;
  for (int64_t bin = 0; bin < kBins; ++bin) {
    counts_[bin] += packed_[bin] >> kCountShift;
    sums_[bin] += packed_[bin] & (kOne - 1);
    packed_[bin] = 0;
  }
  pending_ = 0;
}

void Histogram::add(const void* x, int64_t n, Element element, double largest) {
  cover(largest);
  if (pending_ + n > kHistogramRun) empty();
  pending_ += n;
  total_ += static_cast<double>(n);
  kernels().histogram[element](x, n, std::ldexp(1.0, kBinBits + kFractionBits - exponent_), packed_.data());
}

void Histogram::add(Histogram& other) {
  if (other.total_ == 0) return;
  other.empty();
  cover(std::ldexp(0.75, other.exponent_));
  empty();
  while (other.exponent_ < exponent_) other.widen();
  for (int64_t bin = 0; bin < kBins; ++bin) {
    counts_[bin] += other.counts_[bin];
    sums_[bin] += other.sums_[bin];
  }
  total_ += other.total_;
}

double Histogram::edge(int64_t bin) const { return static_cast<double>(bin) * width_; }

void Histogram::finish() {
  empty();
  width_ = std::ldexp(1.0, exponent_ - kBinBits);
  unit_ = std::ldexp(1.0, exponent_ - kBinBits - kFractionBits);
  count_before_.assign(kBins + 1, 0.0);
  sum_before_.assign(kBins + 1, 0.0);
  squares_ = 0;
  for (int64_t bin = 0; bin < kBins; ++bin) {
    const double count = static_cast<double>(counts_[bin]), sum = static_cast<double>(sums_[bin]) * unit_;
    count_before_[bin + 1] = count_before_[bin] + count;
    sum_before_[bin + 1] = sum_before_[bin] + count * edge(bin) + sum;
    squares_ += count * edge(bin + 1) * edge(bin + 1);
  }
}

bool Histogram::resolves(double smallest_scale) const { return width_ < 0.5 * smallest_scale; }

Histogram::Bounds Histogram::bounds(const Candidate& candidate, int64_t levels) const {
  const double s = candidate.scale;
  // Sum of (v - L s)^2 less the sum of v^2, that is L^2 s^2 n - 2 L s sum(v), over the cells between two boundaries.
  // The cell above the boundary t gains against the cell below by 2 s (v - t), which is what a cut bin is uncertain
  // about.
  double low = 0, high = 0, near = 0;
  int64_t from = 0;
  double level = 0;
  for (int64_t l = 0; l < levels; ++l) {
    const double t = (static_cast<double>(l) + 0.5) * s;
    const int64_t cut = std::min<int64_t>(kBins, static_cast<int64_t>(t / width_));
    const double n = count_before_[cut] - count_before_[from], sum = sum_before_[cut] - sum_before_[from];
    const double exact = level * s * (level * s * n - 2 * sum);
    low += exact;
    high += exact;
    if (cut == kBins) {
      from = kBins;
      break;
    }
    const double inside = static_cast<double>(counts_[cut]);
    if (inside > 0) {
      // The bin taken as if it all lay below, less the gain of the part above: at least what the mean gains (Jensen),
      // at most what the chord over the bin gives.
      const double offset = static_cast<double>(sums_[cut]) * unit_, v = inside * edge(cut) + offset;
      const double below = level * s * (level * s * inside - 2 * v);
      const double least = std::max(0.0, v - inside * t), most = offset / width_ * (edge(cut + 1) - t);
      low += below - 2 * s * std::max(least, most);
      high += below - 2 * s * least;
      near += inside * t;
    }
    from = cut + 1;
    level = static_cast<double>(l + 1);
  }
  const double n = count_before_[kBins] - count_before_[from], sum = sum_before_[kBins] - sum_before_[from];
  const double rest = level * s * (level * s * n - 2 * sum);
  low += rest;
  high += rest;

  // What float32 arithmetic may add: the product code * scale and the difference are rounded (Cauchy-Schwarz over all
  // values), values within rounding of a boundary may fall on its other side, positions in a bin are cut to whole
  // units.
  constexpr double ulp = 1.1920928955078125e-07;
  const double error = std::max(0.0, squares_ + high);
  const double slack = 2 * ulp * std::sqrt(error * (2 * squares_ + total_ * s * s)) + 4 * ulp * error +
                       4 * ulp * s * near + 4 * s * static_cast<double>(levels) * (total_ + 64.0 * kBins) * unit_ +
                       1e-13 * squares_;
  return {low - slack, high + slack};
}

}  // namespace amct_ext::cpu
