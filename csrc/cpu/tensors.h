// The edge between tensors and loops: element types, splitting work over threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "layout.h"

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

inline at::Tensor scalar_like(const at::Tensor& like, double v) {
  at::Tensor result = at::empty({}, like.options());
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

}  // namespace amct_ext::cpu
