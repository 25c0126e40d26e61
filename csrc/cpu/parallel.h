// Work on contiguous elements and on rows, split over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace amct_ext::cpu {

// Work is cut into blocks of a fixed size, whatever the number of threads: partial sums of blocks are added in order,
// so a result has the same bits with one thread or many.
constexpr int64_t kBlock = 16384;
constexpr int64_t kGrain = 2;  // blocks for which another thread is worth waking

constexpr int64_t block_count(int64_t n) { return (n + kBlock - 1) / kBlock; }

// f(block, begin, end) for the blocks of [0, n).
template <typename F>
void for_blocks(int64_t n, const F& f) {
  at::parallel_for(0, block_count(n), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) f(block, block * kBlock, std::min(n, (block + 1) * kBlock));
  });
}

// Rows for which another thread is worth waking, of `size` elements each.
inline int64_t row_grain(int64_t size) { return std::max<int64_t>(1, kGrain * kBlock / std::max<int64_t>(1, size)); }

// f(row) for rows of `size` elements each.
template <typename F>
void for_rows(int64_t rows, int64_t size, const F& f) {
  at::parallel_for(0, rows, row_grain(size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) f(row);
  });
}

}  // namespace amct_ext::cpu
