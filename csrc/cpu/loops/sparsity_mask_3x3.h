// 2:4 masks of 3x3 kernels: rows of nine weights, a register and one more or part of a register. Rows are compared as
// they lie, and what is kept is stored in memory order, nine registers of it at a time.
#pragma once

#include <utility>

#include "cpu/loops/sparsity_groups.h"

namespace amct_ext::cpu {
namespace {

constexpr int kNine = 9;
template <typename T>
constexpr bool kHasNines = sizeof(T) == 4 && kWidth<T> >= 8;
template <typename T>
constexpr int kNineGroups = kWidth<T> / 4;  // that fill nine registers

// Register kAt in memory order, from what a group has for its first columns and for its last: a register each, the same
// one where it holds nine.
template <typename T, int kAt, int... I>
AMCT_INLINE V<T> of_nines(const V<T>* first, const V<T>* last, std::integer_sequence<int, I...>) {
  constexpr int width = kWidth<T>, start = kAt * width, column = start % kNine, size = 4 * kNine;
  constexpr int group = start / size, next = (start + width - 1) / size;
  if constexpr (width >= kNine) {
    return __builtin_shufflevector(
        first[group], first[next],
        ((start + I) / size == group ? (start + I) % kNine : width + (start + I) % kNine)...);
  } else if constexpr (column == 0) {
    return first[group];
  } else {  // the last columns of a row, then the first of the next: one is a lane further than the other
    constexpr int turn = column - 1;
    const V<T> mixed = __builtin_shufflevector(first[next], last[group], (I < turn ? I : width + I)...);
    return __builtin_shufflevector(mixed, mixed, ((I + turn) % width)...);
  }
}

// Nine registers from `at` on. Where a register holds more than a row, some values behind them are read; if the choice
// is open, also written, and written again with the groups that follow.
template <typename T, typename Use>
AMCT_INLINE void mask_nines(const T* w, uint8_t* mask, int64_t at, Use& use) {
  using C = Choice<sizeof(T)>;
  constexpr int width = kWidth<T>, groups = kNineGroups<T>;
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  V<T> first[groups], last[groups];
  typename C::Lanes open = {};
  const auto compare = [&](const T* from, V<T>& second) __attribute__((always_inline)) {
    const V<T> m[4] = {magnitudes<T>(load(from)), magnitudes<T>(load(from + kNine)),
                       magnitudes<T>(load(from + 2 * kNine)), magnitudes<T>(load(from + 3 * kNine))};
    open |= second_largest<T>(m, second);
  };
  for (int g = 0; g < groups; ++g) {
    const T* from = w + at + g * 4 * kNine;
    compare(from, first[g]);
    if constexpr (width < kNine) compare(from + kNine - width, last[g]);
  }
  if (somewhere(open)) [[unlikely]] {
    for (int64_t g = at; g < at + kNine * width; g += 4 * kNine) mask_group(w, mask, g, kNine, use);
    return;
  }
  const auto keep = [&](V<T> raw, V<T> second)
                        __attribute__((always_inline)) { return C::from(magnitudes<T>(raw), second); };
  const auto four = [&]<int kAt>(std::integer_sequence<int, kAt>) __attribute__((always_inline)) {
    const T* from = w + at + kAt * width;
    const V<T> raw[4] = {load(from), load(from + width), load(from + 2 * width), load(from + 3 * width)};
    const typename C::Keep kept[4] = {
        keep(raw[0], of_nines<T, kAt>(first, last, lanes)), keep(raw[1], of_nines<T, kAt + 1>(first, last, lanes)),
        keep(raw[2], of_nines<T, kAt + 2>(first, last, lanes)), keep(raw[3], of_nines<T, kAt + 3>(first, last, lanes))};
    put_four<T>(raw, kept, mask, at + kAt * width, width, use);
  };
  four(std::integer_sequence<int, 0>{});
  four(std::integer_sequence<int, 4>{});
  const int64_t end = at + 8 * width;
  const V<T> raw = load(w + end);
  const typename C::Keep kept = keep(raw, of_nines<T, 8>(first, last, lanes));
  C::put(kept, mask + end);
  use(raw, kept, end);
}

}  // namespace
}  // namespace amct_ext::cpu
