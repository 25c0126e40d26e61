// searchN: the squared error of every shift of the accumulator.
#pragma once

#include "cpu/isa/scalar.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

constexpr int kShifts = 16;

template <typename T>
void shift_errors(const void* x_, int64_t n, double scale, double* errors) {
  const T* x = static_cast<const T*>(x_);
  constexpr int kBlock = 256;
  double total[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = n - begin < kBlock ? static_cast<int>(n - begin) : kBlock;
    for (int i = 0; i < count; ++i) {
      const double s = math::round_even(static_cast<double>(widen(x[begin + i])) / scale);
      total[i] = math::clamp(s, -2147483648.0, 2147483647.0);
    }
    for (int shift = 1; shift <= kShifts; ++shift) {
      const double step = static_cast<double>(1 << shift), inverse = 1.0 / step;  // powers of two: exact
      double sums[8] = {};
      for (int i = 0; i < count; ++i) {
        const double kept = math::clamp(__builtin_floor(total[i] * inverse), -32768.0, 32767.0) * step;
        sums[i & 7] += (kept - total[i]) * (kept - total[i]);
      }
      double sum = 0;
      for (double s : sums) sum += s;
      errors[shift - 1] += sum;
    }
  }
}

}  // namespace
}  // namespace amct_ext::cpu
