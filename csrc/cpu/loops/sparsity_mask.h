// 2:4 masks of planes of weights: `count` rows of `inner` values, groups along the rows.
#pragma once

#include "cpu/loops/sparsity_groups.h"
#include "cpu/loops/sparsity_mask_3x3.h"

namespace amct_ext::cpu {
namespace {

// `n` values, at most a vector, of up to four rows: with masked memory access, or by way of a copy padded with zeros.
template <typename T>
AMCT_INLINE void mask_tail(const T* w, uint8_t* mask, int64_t inner, int rows, int64_t n) {
  using K = KeepMask<sizeof(T)>;
  if constexpr (K::kMaskedMemory) {
    const auto lanes = static_cast<typename K::Lanes>(~uint64_t{0} >> (64 - n));
    // Lanes that are not loaded hold 1, 1, 0, 0: no tie, so they do not force the exact rule.
    IVec<T> raw[4] = {IVec<T>{} + 1, IVec<T>{} + 1, {}, {}};
    for (int r = 0; r < rows; ++r) raw[r] = K::load_some(raw[r], lanes, w + r * inner);
    for (int r = rows; r < 4; ++r) raw[r] = IVec<T>{};
    keep_2of4<T>(raw, [&](const auto* keep) __attribute__((always_inline)) {
      for (int r = 0; r < rows; ++r) K::store_some(mask + r * inner, lanes, keep[r]);
    });
  } else {
    constexpr int width = kLanes<T>;
    T in[4 * width] = {};
    uint8_t bytes[4 * width];
    for (int r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < n; ++i) in[r * width + i] = w[r * inner + i];
    }
    MaskSink sink;
    mask_4_rows(in, bytes, 0, width, sink);
    for (int r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < n; ++i) mask[r * inner + i] = bytes[r * width + i];
    }
  }
}

// Groups that whole vectors cannot take: the last of a plane, and rows that do not fill a group.
template <typename T>
void mask_remainder(const T* w, uint8_t* mask, int64_t count, int64_t inner) {
  for (int64_t row = 0; row < count; row += 4) {
    const int rows = count - row < 4 ? static_cast<int>(count - row) : 4;
    for (int64_t i = 0; i < inner; i += kLanes<T>) {
      const int64_t at = row * inner + i, n = inner - i < kLanes<T> ? inner - i : kLanes<T>;
      mask_tail(w + at, mask + at, inner, rows, n);
    }
  }
}

// Whole groups. Returns how many were done: with rows shorter than a vector the last groups have too little memory
// behind them to be read by vectors.
template <typename T, typename Sink>
AMCT_INLINE int64_t mask_groups(const T* w, uint8_t* mask, int64_t groups, int64_t inner, Sink& sink) {
  constexpr int64_t width = kLanes<T>;
  const int64_t size = groups * 4 * inner;
  if (inner == 1) {
    int64_t at = 0;
    for (; at + 4 * width <= size; at += 4 * width) {
      prefetch_span(w + at, 4 * width);
      prefetch<1>(mask + at, kPrefetchDistance);
      sink.prefetch(at, 4 * width);
      mask_contiguous(w, mask, at, sink);
    }
    return at / 4;
  }
  int64_t g = 0;
  if constexpr (kHas3x3<T>) {
    constexpr int64_t block = k3x3 * width, read = width < k3x3 ? block : block - k3x3 + width;
    for (; inner == k3x3 && g * 4 * k3x3 + read <= size; g += k3x3Groups<T>) {
      prefetch_span(w + g * 4 * k3x3, block);
      sink.prefetch(g * 4 * k3x3, block);
      mask_3x3(w, mask, g * 4 * k3x3, sink);
    }
  }
  for (; g < groups; ++g) {
    const int64_t start = g * 4 * inner;
    if (inner < width && start + 3 * inner + width > size) return g;
    prefetch_span(w + start, 4 * inner);
    sink.prefetch(start, 4 * inner);
    mask_group(w, mask, start, inner, sink);
  }
  return groups;
}

template <typename T>
void apply_mask(const void* w_, const uint8_t* __restrict mask, void* y_, int64_t n) {
  const T* __restrict w = static_cast<const T*>(w_);
  T* __restrict y = static_cast<T*>(y_);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    prefetch<kVecBytes>(w + i, kPrefetchDistance);
    prefetch<kVecBytes>(y + i, kPrefetchDistance);
    store(y + i, load_masked(w + i, mask + i));
  }
#pragma GCC unroll 1
  for (; i < n; ++i) y[i] = load_element<true>(w, mask, i);
}

template <typename T>
void sr_ste_backward(const void* grad_, const void* w_, const uint8_t* __restrict mask, void* d_w_, int64_t n,
                     double decay) {
  const T* __restrict grad = static_cast<const T*>(grad_);
  const T* __restrict w = static_cast<const T*>(w_);
  T* __restrict d_w = static_cast<T*>(d_w_);
  const Acc<T> factor = static_cast<Acc<T>>(decay);
  for (int64_t i = 0; i < n; ++i) {
    const Bits<T> dropped = static_cast<Bits<T>>(static_cast<Bits<T>>(mask[i]) - 1);  // no bit where the mask is 1
    const T v = bit_cast<T>(static_cast<Bits<T>>(bit_cast<Bits<T>>(w[i]) & dropped));
    d_w[i] = narrow<T>(widen(grad[i]) + factor * widen(v));
  }
}

template <typename T>
void mask_plane(const void* w_, uint8_t* mask, int64_t count, int64_t inner) {
  const T* w = static_cast<const T*>(w_);
  if (count <= 2) {
    for (int64_t i = 0; i < count * inner; ++i) mask[i] = 1;
    return;
  }
  MaskSink sink;
  const int64_t done = mask_groups(w, mask, count / 4, inner, sink), at = 4 * done * inner;
  mask_remainder(w + at, mask + at, count - 4 * done, inner);
}

// The mask and what the sink makes of the weights, in one pass. With rows shorter than a vector the mask is made first:
// stores that overlap are slower than a loop of their own.
template <typename T, typename Sink>
AMCT_INLINE void sparsify(const T* w, uint8_t* mask, int64_t count, int64_t inner, Sink& sink) {
  const bool fused = count > 2 && (inner == 1 || inner >= kLanes<T> || (kHas3x3<T> && inner == k3x3));
  const int64_t groups = fused ? mask_groups(w, mask, count / 4, inner, sink) : 0;
  const int64_t done = 4 * groups * inner, n = count * inner;
  if (done == n) return;
  mask_plane<T>(w + done, mask + done, count - 4 * groups, inner);
  apply_mask<T>(w + done, mask + done, sink.y + done, n - done);
  sink.add_span_to_range(done, n);
}

template <typename T>
void sparsify_plane(const void* w, uint8_t* mask, void* y, int64_t count, int64_t inner) {
  ApplySink<T> sink = {static_cast<T*>(y)};
  sparsify(static_cast<const T*>(w), mask, count, inner, sink);
}

template <typename T>
Range sparsify_and_range(const void* w, uint8_t* mask, void* y, int64_t count, int64_t inner) {
  ApplyAndRangeSink<T> sink = {{static_cast<T*>(y)}};
  sparsify(static_cast<const T*>(w), mask, count, inner, sink);
  return sink.range.result([&] { return range_by_value<false>(sink.y, nullptr, count * inner); });
}

}  // namespace
}  // namespace amct_ext::cpu
