// 2:4 masks: how groups come to lie in the lanes of registers, and what is kept goes back to its place.
#pragma once

#include <utility>

#include "cpu/isa/choice.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

// Four rows of a register of groups, `inner` apart.
template <typename T>
AMCT_INLINE void mask_rows(const T* w, uint8_t* mask, int64_t inner) {
  const V<T> raw[4] = {load(w), load(w + inner), load(w + 2 * inner), load(w + 3 * inner)};
  choose<T>(raw,
            [&](int r, auto keep) __attribute__((always_inline)) { Choice<sizeof(T)>::put(keep, mask + r * inner); });
}

// Every second lane of two registers, from the first or from the second on.
template <int kFirst, typename V, int... I>
AMCT_INLINE V every_second(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + kFirst)...);
}

// Register kAt of four in memory order, from one value for each group.
template <int kAt, typename V, int... I>
AMCT_INLINE V of_groups(V v, std::integer_sequence<int, I...>) {
  constexpr int kFirst = kAt * static_cast<int>(sizeof...(I));
  return __builtin_shufflevector(v, v, ((kFirst + I) / 4)...);
}

// The same from one value for each member.
template <int kAt, typename V, int... I>
AMCT_INLINE V of_members(const V* v, std::integer_sequence<int, I...> lanes) {
  constexpr int kFirst = kAt * static_cast<int>(sizeof...(I));
  constexpr V member = {((kFirst + I) % 4)...};
  return (of_groups<kAt>(v[0], lanes) & (member == 0)) | (of_groups<kAt>(v[1], lanes) & (member == 1)) |
         (of_groups<kAt>(v[2], lanes) & (member == 2)) | (of_groups<kAt>(v[3], lanes) & (member == 3));
}

// Four registers of groups that lie side by side.
template <typename T>
AMCT_INLINE void mask_neighbours(const T* w, uint8_t* mask) {
  constexpr int width = kWidth<T>;
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  const V<T> raw[4] = {load(w), load(w + width), load(w + 2 * width), load(w + 3 * width)};
  const V<T> in[4] = {magnitudes<T>(raw[0]), magnitudes<T>(raw[1]), magnitudes<T>(raw[2]), magnitudes<T>(raw[3])};
  const V<T> even[2] = {every_second<0>(in[0], in[1], lanes), every_second<0>(in[2], in[3], lanes)};
  const V<T> odd[2] = {every_second<1>(in[0], in[1], lanes), every_second<1>(in[2], in[3], lanes)};
  const V<T> m[4] = {every_second<0>(even[0], even[1], lanes), every_second<0>(odd[0], odd[1], lanes),
                     every_second<1>(even[0], even[1], lanes), every_second<1>(odd[0], odd[1], lanes)};
  const auto put = [&](int r, auto kept)
                       __attribute__((always_inline)) { Choice<sizeof(T)>::put(kept, mask + r * width); };
  V<T> second, keep[4];
  if (second_largest<T>(m, second)) [[likely]] {
    put(0, Choice<sizeof(T)>::at_least(in[0], of_groups<0>(second, lanes)));
    put(1, Choice<sizeof(T)>::at_least(in[1], of_groups<1>(second, lanes)));
    put(2, Choice<sizeof(T)>::at_least(in[2], of_groups<2>(second, lanes)));
    put(3, Choice<sizeof(T)>::at_least(in[3], of_groups<3>(second, lanes)));
  } else {
    chosen_exactly<T>(m, keep);
    put(0, Choice<sizeof(T)>::ones(of_members<0>(keep, lanes)));
    put(1, Choice<sizeof(T)>::ones(of_members<1>(keep, lanes)));
    put(2, Choice<sizeof(T)>::ones(of_members<2>(keep, lanes)));
    put(3, Choice<sizeof(T)>::ones(of_members<3>(keep, lanes)));
  }
}

// `n` values of up to four rows, at most a register wide.
#if defined(AMCT_AVX512)
template <typename T>
AMCT_INLINE void mask_piece(const T* w, uint8_t* mask, int64_t inner, int rows, int64_t n) {
  using C = Choice<sizeof(T)>;
  const auto lanes = static_cast<typename C::Lanes>(~uint64_t{0} >> (64 - n));
  V<T> raw[4] = {V<T>{} + 1, V<T>{} + 1, {}, {}};  // where nothing is read the choice is clear
  for (int r = 0; r < rows; ++r) raw[r] = C::load(raw[r], lanes, w + r * inner);
  for (int r = rows; r < 4; ++r) raw[r] = V<T>{};
  choose<T>(raw, [&](int r, auto keep) __attribute__((always_inline)) {
    if (r < rows) C::put(lanes, keep, mask + r * inner);
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
  mask_rows(in, bytes, width);
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

// Whole groups; returns how many were masked. Rows of a register or more: the last register of a row overlaps the one
// before. Shorter rows: what is written beyond a row is overwritten by the rows that follow, which go out in rising
// order, as far as enough of them follow.
template <typename T>
AMCT_INLINE int64_t mask_groups(const T* w, uint8_t* mask, int64_t groups, int64_t inner) {
  constexpr int64_t width = kWidth<T>;
  const int64_t size = groups * 4 * inner;
  if (inner == 1) {
    int64_t at = 0;
    for (; at + 4 * width <= size; at += 4 * width) {
      mask_neighbours(w + at, mask + at);
    }
    return at / 4;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = g * 4 * inner;
    if (inner < width && start + 3 * inner + width > size) return g;
    for (int64_t i = 0; i < inner; i += width) {
      const int64_t at = start + (i + width <= inner || inner < width ? i : inner - width);
      mask_rows(w + at, mask + at, inner);
    }
  }
  return groups;
}

template <typename T>
void apply_mask(const void* w_, const uint8_t* __restrict mask, void* y_, int64_t n) {
  const T* __restrict w = static_cast<const T*>(w_);
  T* __restrict y = static_cast<T*>(y_);
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) {
    const V<T> kept = load_kept(w + i, mask + i);
    __builtin_memcpy(y + i, &kept, sizeof(kept));
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
  const int64_t done = mask_groups<T>(w, mask, count / 4, inner), at = 4 * done * inner;
  mask_rest(w + at, mask + at, count - 4 * done, inner);
}

}  // namespace
}  // namespace amct_ext::cpu
