// Loops over the channels of a weight, seen along its channel axis.
#pragma once

#include <vector>

#include "common/layout.h"
#include "cpu/parallel.h"

namespace amct_ext::cpu {

// f(channel, first element, number of elements) for every run. A channel stays on one thread, its runs in order.
template <typename F>
void for_channel_runs(const AxisView& view, const F& f) {
  for_rows(view.size, view.outer * view.inner, [&](int64_t channel) {
    for (int64_t o = 0; o < view.outer; ++o) f(channel, (o * view.size + channel) * view.inner, view.inner);
  });
}

// The same for elementwise work, where a single channel is cut into blocks.
template <typename F>
void for_channel_blocks(const AxisView& view, const F& f) {
  if (view.size == 1) {
    for_blocks(view.outer * view.inner, [&](int64_t, int64_t begin, int64_t end) { f(0, begin, end - begin); });
  } else {
    for_channel_runs(view, f);
  }
}

// One float64 sum per channel of f(channel, first element, number of elements), the same bits for any number of
// threads.
template <typename F>
std::vector<double> channel_sums(const AxisView& view, const F& f) {
  std::vector<double> sums(view.size, 0.0);
  if (view.size == 1) {
    const int64_t n = view.outer * view.inner;
    std::vector<double> parts(block_count(n));
    for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) { parts[block] = f(0, begin, end - begin); });
    for (double part : parts) sums[0] += part;
  } else {
    for_channel_runs(view, [&](int64_t channel, int64_t begin, int64_t n) { sums[channel] += f(channel, begin, n); });
  }
  return sums;
}

}  // namespace amct_ext::cpu
