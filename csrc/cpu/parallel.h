// The edge between tensors and loops: element types, splitting work over threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "common/layout.h"
#include "cpu/dispatch.h"

namespace amct_ext::cpu {

// Work is cut into blocks of a fixed size, whatever the number of threads: partial sums of blocks are added in order,
// so a result has the same bits with one thread or many.
constexpr int64_t kBlock = 16384;
constexpr int64_t kGrain = 2;  // blocks for which another thread is worth waking

inline Element element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      return kFloat32;
  }
}

inline double value_at(const at::Tensor& x, int64_t i) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return static_cast<const double*>(x.const_data_ptr())[i];
    case at::kBFloat16:
      return static_cast<double>(static_cast<float>(static_cast<const c10::BFloat16*>(x.const_data_ptr())[i]));
    case at::kHalf:
      return static_cast<double>(static_cast<float>(static_cast<const c10::Half*>(x.const_data_ptr())[i]));
    default:
      return static_cast<double>(static_cast<const float*>(x.const_data_ptr())[i]);
  }
}

inline void set_value(const at::Tensor& x, int64_t i, double v) {
  switch (x.scalar_type()) {
    case at::kDouble:
      static_cast<double*>(x.mutable_data_ptr())[i] = v;
      return;
    case at::kBFloat16:
      static_cast<c10::BFloat16*>(x.mutable_data_ptr())[i] = static_cast<float>(v);
      return;
    case at::kHalf:
      static_cast<c10::Half*>(x.mutable_data_ptr())[i] = static_cast<float>(v);
      return;
    default:
      static_cast<float*>(x.mutable_data_ptr())[i] = static_cast<float>(v);
  }
}

// Allocations without the way through the dispatcher: most of the time of a small call.
inline at::Tensor new_scalar(at::ScalarType type) { return at::Tensor(at::detail::empty_cpu({}, type)); }

// With the layout that elementwise results of x have.
inline at::Tensor result_like(const at::Tensor& x, at::ScalarType type) {
  if (!x.is_non_overlapping_and_dense()) return at::empty_like(x, x.options().dtype(type));
  return at::Tensor(at::detail::empty_strided_cpu(x.sizes(), x.strides(), type));
}

inline at::Tensor scalar_like(const at::Tensor& like, double v) {
  at::Tensor result = new_scalar(like.scalar_type());
  set_value(result, 0, v);
  return result;
}

inline const char* at_element(const void* data, int64_t i, size_t size) {
  return static_cast<const char*>(data) + i * static_cast<int64_t>(size);
}
inline char* at_element(void* data, int64_t i, size_t size) {
  return static_cast<char*>(data) + i * static_cast<int64_t>(size);
}

// Blocks of a plain range: f(block, begin, end).
template <typename F>
void for_blocks(int64_t n, const F& f) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) f(block, block * kBlock, std::min(n, (block + 1) * kBlock));
  });
}

// Rows of `size` elements each: f(row).
template <typename F>
void for_rows(int64_t rows, int64_t size, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain * kBlock / std::max<int64_t>(1, size));
  at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) f(row);
  });
}

// A tensor read in the order in which a dense tensor, made by `empty_like` of it, lies in memory: `count` runs
// of `length` neighbours each. Only outer axes have sizes and strides here; a dense tensor is one run.
struct Walk {
  int64_t count = 1, length = 1;
  c10::SmallVector<int64_t, 6> sizes, strides;

  Walk(at::IntArrayRef shape, at::IntArrayRef from, at::IntArrayRef to) {
    c10::SmallVector<int64_t, 6> axes;
    for (int64_t axis = 0; axis < static_cast<int64_t>(shape.size()); ++axis) {
      if (shape[axis] == 0) length = 0;
      if (shape[axis] != 1) axes.push_back(axis);
    }
    std::sort(axes.begin(), axes.end(), [&](int64_t a, int64_t b) { return to[a] < to[b]; });
    size_t inner = 0;  // axes that continue the run, from the innermost out
    while (length && inner < axes.size() && from[axes[inner]] == length) length *= shape[axes[inner++]];
    for (size_t i = axes.size(); length && i-- > inner;) {
      sizes.push_back(shape[axes[i]]);
      strides.push_back(from[axes[i]]);
      count *= shape[axes[i]];
    }
  }

  // Where a run begins.
  int64_t start(int64_t run) const {
    int64_t at = 0;
    for (size_t i = sizes.size(); i-- > 0; run /= sizes[i]) at += run % sizes[i] * strides[i];
    return at;
  }

  // Blocks are a part of a long run, or as many short ones as fill one.
  int64_t parts() const { return std::max<int64_t>(1, (length + kBlock - 1) / kBlock); }
  int64_t together() const { return std::max<int64_t>(1, kBlock / std::max<int64_t>(1, length)); }
  int64_t blocks() const { return length == 0 ? 0 : (count + together() - 1) / together() * parts(); }
};

// Too short to be worth a call each: such a tensor is copied.
constexpr int64_t kShortRun = 256;

// x itself where it can be walked in long runs; else a copy of it in the layout its elementwise results have.
inline at::Tensor in_runs(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense() || x.numel() == 0) return x;
  const at::Tensor like = at::empty_like(x, x.options().device(at::kMeta));
  const Walk walk(x.sizes(), x.strides(), like.strides());
  return walk.length < kShortRun ? at::empty_like(x).copy_(x) : x;
}

// f(block, where to read, where to write, number of elements), blocks being walked in order within a thread.
template <typename F>
void for_walk(const Walk& walk, const F& f) {
  const int64_t parts = walk.parts(), together = walk.together();
  at::parallel_for(0, walk.blocks(), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t run = block / parts * together, skip = block % parts * kBlock;
      const int64_t n = std::min(walk.length - skip, kBlock);
      for (int64_t r = run; r < std::min(run + together, walk.count); ++r) {
        f(block, walk.start(r) + skip, r * walk.length + skip, n);
      }
    }
  });
}

}  // namespace amct_ext::cpu
