// 2:4 masks of 3x3 kernels: rows of nine weights, each a vector and one more value, or part of a vector. Rows are
// compared where they lie; what is kept is stored in memory order, nine vectors at a time.
#pragma once

#include <utility>

#include "cpu/loops/sparsity_groups.h"

namespace amct_ext::cpu {
namespace {

constexpr int k3x3 = 9;
template <typename T>
constexpr bool kHas3x3 = sizeof(T) == 4 && kLanes<T> >= 8;
template <typename T>
constexpr int k3x3Groups = kLanes<T> / 4;  // fill nine vectors

// Vector kAt in memory order, from what a group has for its first columns and for its last: a vector each, the same one
// where it holds nine.
template <typename T, int kAt, int... I>
AMCT_INLINE IVec<T> spread_3x3(const IVec<T>* first, const IVec<T>* last, std::integer_sequence<int, I...>) {
  constexpr int width = kLanes<T>, start = kAt * width, column = start % k3x3, size = 4 * k3x3;
  constexpr int group = start / size, next = (start + width - 1) / size;
  if constexpr (width >= k3x3) {
    return __builtin_shufflevector(first[group], first[next],
                                   ((start + I) / size == group ? (start + I) % k3x3 : width + (start + I) % k3x3)...);
  } else if constexpr (column == 0) {
    return first[group];
  } else {  // the last columns of a row, then the first of the next, rotated by one lane
    constexpr int turn = column - 1;
    const IVec<T> mixed = __builtin_shufflevector(first[next], last[group], (I < turn ? I : width + I)...);
    return __builtin_shufflevector(mixed, mixed, ((I + turn) % width)...);
  }
}

// Nine vectors from `at` on. Where a vector holds more than a row, some values behind them are read. On the exact path
// these are also written, and written again with the groups that follow.
template <typename T, typename Sink>
AMCT_INLINE void mask_3x3(const T* w, uint8_t* mask, int64_t at, Sink& sink) {
  using K = KeepMask<sizeof(T)>;
  constexpr int width = kLanes<T>, groups = k3x3Groups<T>;
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  IVec<T> first[groups], last[groups];
  typename K::Lanes undecided = {};
  const auto compare = [&](const T* from, IVec<T>& second) __attribute__((always_inline)) {
    const IVec<T> m[4] = {abs_bits<T>(load_bits(from)), abs_bits<T>(load_bits(from + k3x3)),
                          abs_bits<T>(load_bits(from + 2 * k3x3)), abs_bits<T>(load_bits(from + 3 * k3x3))};
    undecided |= second_largest<T>(m, second);
  };
  for (int g = 0; g < groups; ++g) {
    const T* from = w + at + g * 4 * k3x3;
    compare(from, first[g]);
    if constexpr (width < k3x3) compare(from + k3x3 - width, last[g]);
  }
  if (any_lane(undecided)) [[unlikely]] {
    for (int64_t g = at; g < at + k3x3 * width; g += 4 * k3x3) mask_group(w, mask, g, k3x3, sink);
    return;
  }
  const auto keep = [&](IVec<T> raw, IVec<T> second)
                        __attribute__((always_inline)) { return K::at_least(abs_bits<T>(raw), second); };
  const auto four = [&]<int kAt>(std::integer_sequence<int, kAt>) __attribute__((always_inline)) {
    const T* from = w + at + kAt * width;
    const IVec<T> raw[4] = {load_bits(from), load_bits(from + width), load_bits(from + 2 * width),
                            load_bits(from + 3 * width)};
    const typename K::Keep kept[4] = {keep(raw[0], spread_3x3<T, kAt>(first, last, lanes)),
                                      keep(raw[1], spread_3x3<T, kAt + 1>(first, last, lanes)),
                                      keep(raw[2], spread_3x3<T, kAt + 2>(first, last, lanes)),
                                      keep(raw[3], spread_3x3<T, kAt + 3>(first, last, lanes))};
    emit4<T>(raw, kept, mask, at + kAt * width, width, sink);
  };
  four(std::integer_sequence<int, 0>{});
  four(std::integer_sequence<int, 4>{});
  const int64_t end = at + 8 * width;
  const IVec<T> raw = load_bits(w + end);
  const typename K::Keep kept = keep(raw, spread_3x3<T, 8>(first, last, lanes));
  K::store(mask + end, kept);
  sink(raw, kept, end);
}

}  // namespace
}  // namespace amct_ext::cpu
