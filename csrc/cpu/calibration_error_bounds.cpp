#include "cpu/calibration_error_bounds.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace amct_ext::cpu {

Histogram::Histogram(int bin_bits) : bin_bits_(bin_bits), bins_(int64_t{1} << bin_bits) {}

void Histogram::extend_range(double largest) {
  if (packed_.empty()) packed_.resize(bins_);
  int needed = 0;
  std::frexp(largest, &needed);  // largest < 2^needed
  if (needed <= exponent_) return;
  if (total_ == 0) {
    exponent_ = needed;
    return;
  }
  flush();
  while (exponent_ < needed) merge_bins();
}

double Histogram::unit() const { return std::ldexp(1.0, exponent_ - bin_bits_ - kFractionBits); }

// Twice the range: every two bins become one. An odd sum loses half a unit.
void Histogram::merge_bins() {
  constexpr uint64_t full = uint64_t{1} << kFractionBits;
  uint64_t odd_sums = 0;
  for (int64_t bin = 0; bin < bins_ / 2; ++bin) {
    const int64_t even = 2 * bin, odd = even + 1;
    const uint64_t sum = sums_[even] + sums_[odd] + counts_[odd] * full;
    counts_[bin] = counts_[even] + counts_[odd];
    sums_[bin] = sum / 2;
    odd_sums += sum & 1;
  }
  std::fill(counts_.begin() + bins_ / 2, counts_.end(), 0);
  std::fill(sums_.begin() + bins_ / 2, sums_.end(), 0);
  lost_ += static_cast<double>(odd_sums) * unit();
  ++exponent_;
}

void Histogram::flush() {
  counts_.resize(bins_);
  sums_.resize(bins_);
  if (pending_ == 0) return;
  for (int64_t bin = 0; bin < bins_; ++bin) {
    counts_[bin] += packed_[bin] >> kCountShift;
    sums_[bin] += packed_[bin] & (kCountOne - 1);
    packed_[bin] = 0;
  }
  pending_ = 0;
}

void Histogram::add(const void* x, int64_t n, Element element, double largest) {
  extend_range(largest);
  if (pending_ + n > kHistogramCapacity) flush();
  pending_ += n;
  total_ += static_cast<double>(n);
  loops().histogram[element](x, n, 1 / unit(), packed_.data());
}

void Histogram::add(Histogram& other) {
  if (other.total_ == 0) return;
  other.flush();
  extend_range(std::ldexp(0.75, other.exponent_));
  flush();
  while (other.exponent_ < exponent_) other.merge_bins();
  for (int64_t bin = 0; bin < bins_; ++bin) {
    counts_[bin] += other.counts_[bin];
    sums_[bin] += other.sums_[bin];
  }
  total_ += other.total_;
  lost_ += other.lost_;
}

double Histogram::edge(int64_t bin) const { return static_cast<double>(bin) * width_; }

void Histogram::finish() {
  flush();
  unit_ = unit();
  width_ = std::ldexp(unit_, kFractionBits);
  count_before_.resize(bins_ + 1);
  sum_before_.resize(bins_ + 1);
  count_before_[0] = sum_before_[0] = squares_ = 0;
  uint64_t count = 0;
  WideSum sum = 0;  // in units: exact
  for (int64_t bin = 0; bin < bins_; ++bin) {
    count += counts_[bin];
    sum += (static_cast<WideSum>(counts_[bin]) * static_cast<uint64_t>(bin) << kFractionBits) + sums_[bin];
    count_before_[bin + 1] = static_cast<double>(count);
    sum_before_[bin + 1] = static_cast<double>(sum) * unit_;
    squares_ += static_cast<double>(counts_[bin]) * edge(bin + 1) * edge(bin + 1);
  }
}

bool Histogram::resolves(double smallest_scale) const { return width_ < 0.5 * smallest_scale; }

Histogram::Bounds Histogram::bounds(const Candidate& candidate, int64_t levels) const {
  const double s = candidate.scale;
  // Sum of (v - L s)^2 less the sum of v^2, that is L^2 s^2 n - 2 L s sum(v), over the cells between two boundaries.
  // The cell above the boundary t gains against the cell below by 2 s (v - t), which is what a cut bin is uncertain
  // about.
  double low = 0, high = 0, near = 0, beyond = 0;
  int64_t from = 0;
  for (int64_t l = 0; l <= levels; ++l) {
    const double level = static_cast<double>(l), t = (level + 0.5) * s;
    const int64_t cut = l == levels ? bins_ : std::min(bins_, static_cast<int64_t>(t / width_));
    const double n = count_before_[cut] - count_before_[from], sum = sum_before_[cut] - sum_before_[from];
    const double exact = level * s * (level * s * n - 2 * sum);
    low += exact;
    high += exact;
    if (l == levels) beyond = std::max(0.0, sum - n * (level - 0.5) * s);
    if (cut == bins_) break;
    const double inside = static_cast<double>(counts_[cut]);
    if (inside > 0) {
      // The whole bin at the level below, less the gain of the part above: at least the gain of the mean (Jensen), at
      // most that of the chord over the bin.
      const double offset = static_cast<double>(sums_[cut]) * unit_, v = inside * edge(cut) + offset;
      const double below = level * s * (level * s * inside - 2 * v);
      const double least = std::max(0.0, v - inside * t), most = offset / width_ * (edge(cut + 1) - t);
      low += below - 2 * s * std::max(least, most);
      high += below - 2 * s * least;
      near += inside * t;
    }
    from = cut + 1;
  }

  // What float32 arithmetic may add: the product code * scale and the difference are rounded (Cauchy-Schwarz over all
  // values), and values within rounding of a boundary may fall on its other side.
  constexpr double ulp = FLT_EPSILON;
  const double error = std::max(0.0, squares_ + high);
  const double rounding =
      2 * ulp * std::sqrt(error * (2 * squares_ + total_ * s * s)) + 4 * ulp * error + 4 * ulp * s * near;
  // Positions are cut to whole units. A value v = q + r that lost d, q being its multiple of the scale, changes the
  // result by 2 q d = 2 v d - 2 r d. The first part is the same for every range and drops out; r is half a step at
  // most, or the distance from the highest code.
  const double excess = std::max(0.0, std::ldexp(width_, bin_bits_) - static_cast<double>(levels) * s);
  const double cutting = 4 * unit_ * (total_ * (0.5 * s + width_) + beyond) + 4 * lost_ * (0.5 * s + width_ + excess);
  // Differences of sums over all bins, in float64.
  const double top = static_cast<double>(levels) * s;
  const double slack =
      rounding + cutting + 1e-13 * squares_ + 1e-15 * static_cast<double>(levels) * top * sum_before_[bins_];
  return {low - slack, high + slack};
}

}  // namespace amct_ext::cpu
