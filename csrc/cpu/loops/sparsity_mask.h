// 2:4 masks: planes of weights.
#pragma once

#include "cpu/loops/sparsity_groups.h"
#include "cpu/loops/sparsity_mask_3x3.h"

namespace amct_ext::cpu {
namespace {

// `n` values of up to four rows, at most a register wide.
#if defined(AMCT_AVX512)
template <typename T>
AMCT_INLINE void mask_piece(const T* w, uint8_t* mask, int64_t inner, int rows, int64_t n) {
  using C = Choice<sizeof(T)>;
  const auto lanes = static_cast<typename C::Lanes>(~uint64_t{0} >> (64 - n));
  V<T> raw[4] = {V<T>{} + 1, V<T>{} + 1, {}, {}};  // where nothing is read the choice is clear
  for (int r = 0; r < rows; ++r) raw[r] = C::load(raw[r], lanes, w + r * inner);
  for (int r = rows; r < 4; ++r) raw[r] = V<T>{};
  choose<T>(raw, [&](const auto* keep) __attribute__((always_inline)) {
    for (int r = 0; r < rows; ++r) C::put(lanes, keep[r], mask + r * inner);
  });
}
#else
// By way of a copy with zeros around it.
template <typename T>
AMCT_INLINE void mask_piece(const T* w, uint8_t* mask, int64_t inner, int rows, int64_t n) {
  constexpr int width = kWidth<T>;
  T in[4 * width] = {};
  uint8_t bytes[4 * width];
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) in[r * width + i] = w[r * inner + i];
  }
  MaskOnly only;
  mask_rows(in, bytes, 0, width, only);
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) mask[r * inner + i] = bytes[r * width + i];
  }
}
#endif

// Groups that a register at a time cannot take: the last of a plane, and rows that do not fill a group.
template <typename T>
void mask_rest(const T* w, uint8_t* mask, int64_t count, int64_t inner) {
  for (int64_t row = 0; row < count; row += 4) {
    const int rows = count - row < 4 ? static_cast<int>(count - row) : 4;
    for (int64_t i = 0; i < inner; i += kWidth<T>) {
      const int64_t at = row * inner + i, n = inner - i < kWidth<T> ? inner - i : kWidth<T>;
      mask_piece(w + at, mask + at, inner, rows, n);
    }
  }
}

// Whole groups; returns how many were done: of rows shorter than a register those that enough rows follow.
template <typename T, typename Use>
AMCT_INLINE int64_t mask_groups(const T* w, uint8_t* mask, int64_t groups, int64_t inner, Use& use) {
  constexpr int64_t width = kWidth<T>;
  const int64_t size = groups * 4 * inner;
  if (inner == 1) {
    int64_t at = 0;
    for (; at + 4 * width <= size; at += 4 * width) {
      bring_all(w + at, 4 * width);
      bring<1>(mask + at, kLead);
      use.ask(at, 4 * width);
      mask_neighbours(w, mask, at, use);
    }
    return at / 4;
  }
  int64_t g = 0;
  if constexpr (kHasNines<T>) {
    constexpr int64_t block = kNine * width, read = width < kNine ? block : block - kNine + width;
    for (; inner == kNine && g * 4 * kNine + read <= size; g += kNineGroups<T>) {
      bring_all(w + g * 4 * kNine, block);
      use.ask(g * 4 * kNine, block);
      mask_nines(w, mask, g * 4 * kNine, use);
    }
  }
  for (; g < groups; ++g) {
    const int64_t start = g * 4 * inner;
    if (inner < width && start + 3 * inner + width > size) return g;
    bring_all(w + start, 4 * inner);
    use.ask(start, 4 * inner);
    mask_group(w, mask, start, inner, use);
  }
  return groups;
}

template <typename T>
void apply_mask(const void* w_, const uint8_t* __restrict mask, void* y_, int64_t n) {
  const T* __restrict w = static_cast<const T*>(w_);
  T* __restrict y = static_cast<T*>(y_);
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) {
    bring<kRegister>(w + i, kLead);
    bring<kRegister>(y + i, kLead);
    store_row(y + i, load_kept(w + i, mask + i));
  }
#pragma GCC unroll 1
  for (; i < n; ++i) y[i] = weight<true>(w, mask, i);
}

template <typename T>
void mask_plane(const void* w_, uint8_t* mask, int64_t count, int64_t inner) {
  const T* w = static_cast<const T*>(w_);
  if (count <= 2) {
    for (int64_t i = 0; i < count * inner; ++i) mask[i] = 1;
    return;
  }
  MaskOnly only;
  const int64_t done = mask_groups(w, mask, count / 4, inner, only), at = 4 * done * inner;
  mask_rest(w + at, mask + at, count - 4 * done, inner);
}

// Rows shorter than a register are masked first: stores that overlap are slower than a loop of their own.
template <typename T, typename Use>
AMCT_INLINE void sparsify(const T* w, uint8_t* mask, int64_t count, int64_t inner, Use& use) {
  const bool together = count > 2 && (inner == 1 || inner >= kWidth<T> || (kHasNines<T> && inner == kNine));
  const int64_t groups = together ? mask_groups(w, mask, count / 4, inner, use) : 0;
  const int64_t done = 4 * groups * inner, n = count * inner;
  if (done == n) return;
  mask_plane<T>(w + done, mask + done, count - 4 * groups, inner);
  apply_mask<T>(w + done, mask + done, use.y + done, n - done);
  use.values(done, n);
}

template <typename T>
void sparsify_plane(const void* w, uint8_t* mask, void* y, int64_t count, int64_t inner) {
  MaskAndApply<T> use = {static_cast<T*>(y)};
  sparsify(static_cast<const T*>(w), mask, count, inner, use);
}

template <typename T>
Range sparsify_and_range(const void* w, uint8_t* mask, void* y, int64_t count, int64_t inner) {
  MaskApplyAndRange<T> use = {{static_cast<T*>(y)}};
  sparsify(static_cast<const T*>(w), mask, count, inner, use);
  return use.extremes.result([&] { return range_by_value<false>(use.y, nullptr, count * inner); });
}

}  // namespace
}  // namespace amct_ext::cpu
