// A fine histogram of magnitudes that bounds the quantisation error of any symmetric range without reading the data
// again.
//
// Bins are equal steps of [0, 2^k). Each knows how many values it holds and the sum of their distances from its lower
// edge. Between two rounding boundaries of a candidate the squared error follows exactly from count, sum and sum of
// squares; only bins that a boundary cuts leave an interval, which convexity keeps small. The sum of squares is
// the same for every candidate, so it drops out of the comparison.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/loop_table.h"

namespace amct_ext::cpu {

class Histogram {
 public:
  explicit Histogram(int bin_bits);  // at most kMaxBinBits

  // Add n values (memory type `element`) none of whose magnitudes exceeds `largest`.
  void add(const void* x, int64_t n, Element element, double largest);
  // Add the values of another histogram.
  void add(Histogram& other);

  struct Bounds {
    double low, high;
  };

  // Must be called once before `bounds`.
  void finish();
  // Whether bins are finer than half a step of every range searched.
  bool resolves(double smallest_scale) const;
  // Sum of the squared errors of a range in float32 arithmetic, less a term that is the same for every range.
  Bounds bounds(const Candidate& candidate, int64_t levels) const;

 private:
  void extend_range(double largest);  // so that `largest` lies in a bin
  void merge_bins();                  // every two become one, for twice the range
  void flush();                       // moves `packed_` into `counts_` and `sums_`
  double unit() const;
  double edge(int64_t bin) const;

  int bin_bits_;
  int64_t bins_;
  int exponent_ = -149;  // values lie below 2^exponent_
  int64_t pending_ = 0;  // values in `packed_` that `counts_` and `sums_` do not hold yet
  std::vector<uint64_t> packed_, counts_, sums_;
  std::vector<double> count_before_, sum_before_;  // over the bins below, after `finish`
  double unit_ = 0, width_ = 0, squares_ = 0, total_ = 0;
  double lost_ = 0;  // at most this much of the sum of all values
};

}  // namespace amct_ext::cpu
