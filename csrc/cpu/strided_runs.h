// Elementwise loops over a strided input and a dense output, in long contiguous runs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>

#include <algorithm>

#include "cpu/parallel.h"

namespace amct_ext::cpu {

// The input in the memory order of the output: `count` runs of `length` contiguous elements. The innermost axes that
// are contiguous in both are coalesced into the run; sizes and strides are those of the axes outside of it. A dense
// input is one run.
struct StridedRuns {
  int64_t count = 1, length = 1;
  c10::SmallVector<int64_t, 6> sizes, strides;

  // `from`: strides of the input; `to`: strides of the output, which is dense.
  StridedRuns(at::IntArrayRef shape, at::IntArrayRef from, at::IntArrayRef to) {
    c10::SmallVector<int64_t, 6> axes;
    for (int64_t axis = 0; axis < static_cast<int64_t>(shape.size()); ++axis) {
      if (shape[axis] == 0) length = 0;
      if (shape[axis] != 1) axes.push_back(axis);
    }
    std::sort(axes.begin(), axes.end(), [&](int64_t a, int64_t b) { return to[a] < to[b]; });
    size_t inner = 0;  // axes in the run
    while (length && inner < axes.size() && from[axes[inner]] == length) length *= shape[axes[inner++]];
    for (size_t i = axes.size(); length && i-- > inner;) {
      sizes.push_back(shape[axes[i]]);
      strides.push_back(from[axes[i]]);
      count *= shape[axes[i]];
    }
  }

  // The first element of a run in the input.
  int64_t start(int64_t run) const {
    int64_t at = 0;
    for (size_t i = sizes.size(); i-- > 0; run /= sizes[i]) at += run % sizes[i] * strides[i];
    return at;
  }

  // A block is a part of a long run, or as many short runs as fill one.
  int64_t blocks_per_run() const { return std::max<int64_t>(1, block_count(length)); }
  int64_t runs_per_block() const { return std::max<int64_t>(1, kBlock / std::max<int64_t>(1, length)); }
  int64_t blocks() const {
    return length == 0 ? 0 : (count + runs_per_block() - 1) / runs_per_block() * blocks_per_run();
  }
};

// Shorter runs are not worth a call each.
constexpr int64_t kMinRun = 256;

// x itself where it coalesces into runs of at least kMinRun elements; else a dense copy.
inline at::Tensor coalesced(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense() || x.numel() == 0) return x;
  const at::Tensor like = at::empty_like(x, x.options().device(at::kMeta));
  const StridedRuns runs(x.sizes(), x.strides(), like.strides());
  return runs.length < kMinRun ? at::empty_like(x).copy_(x) : x;
}

// f(block, first element read, first element written, number of elements); within a thread blocks come in order.
template <typename F>
void for_strided_runs(const StridedRuns& runs, const F& f) {
  const int64_t parts = runs.blocks_per_run(), together = runs.runs_per_block();
  at::parallel_for(0, runs.blocks(), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t run = block / parts * together, skip = block % parts * kBlock;
      const int64_t n = std::min(runs.length - skip, kBlock);
      for (int64_t r = run; r < std::min(run + together, runs.count); ++r) {
        f(block, runs.start(r) + skip, r * runs.length + skip, n);
      }
    }
  });
}

}  // namespace amct_ext::cpu
