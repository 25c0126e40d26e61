// 2:4 masks: how groups come to lie in the lanes of registers, and what is kept goes back to its place.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/isa/choice.h"
#include "cpu/isa/rows.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

// Asks for the memory a lead ahead of `n` values.
template <typename T>
AMCT_INLINE void bring_all(const T* at, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) bring<1>(at + i, kLead);
}

// What else is done with four registers of weights `apart`, once it is known what of them is kept.
struct MaskOnly {
  AMCT_INLINE void ask(int64_t, int64_t) const {}
  AMCT_INLINE void operator()(const auto*, const auto*, int64_t, int64_t) const {}
};

// Weights that are not kept become +0.
template <typename T>
struct MaskAndApply {
  using C = Choice<sizeof(T)>;
  T* y;
  AMCT_INLINE void ask(int64_t at, int64_t n) const { bring_all(y + at, n); }
  AMCT_INLINE void operator()(const V<T>* raw, const typename C::Keep* keep, int64_t at, int64_t apart) const {
    for (int r = 0; r < 4; ++r) store_row(y + at + r * apart, C::kept(raw[r], keep[r]));
  }
};

// Four rows of a register of groups, `inner` apart, of which the first begins at `at`.
template <typename T, typename Use>
AMCT_INLINE void mask_rows(const T* w, uint8_t* mask, int64_t at, int64_t inner, const Use& use) {
  const T* from = w + at;
  const V<T> raw[4] = {load(from), load(from + inner), load(from + 2 * inner), load(from + 3 * inner)};
  choose<T>(raw, [&](const auto* keep) __attribute__((always_inline)) {
    Choice<sizeof(T)>::put_four(keep, mask + at, inner);
    use(raw, keep, at, inner);
  });
}

// Neighbours are sorted into registers within lanes of 128 bits, which is cheaper than across them; a group of float64
// fills two of these.
template <typename T>
constexpr int kSorted = sizeof(T) == 8 ? kWidth<T> : 16 / static_cast<int>(sizeof(T));

// Every second value of two registers, from the first or from the second on.
template <typename T, int kFirst, int... I>
AMCT_INLINE V<T> every_second(V<T> a, V<T> b, std::integer_sequence<int, I...>) {
  constexpr int n = kSorted<T>;
  using Shuffled = std::conditional_t<sizeof(T) == 4, Row<float>, V<T>>;  // of floats it is one instruction
  return as<V<T>>(__builtin_shufflevector(as<Shuffled>(a), as<Shuffled>(b),
                                          (I / n * n + I % n * 2 % n + kFirst + (I % n < n / 2 ? 0 : kWidth<T>))...));
}

// Register kAt of four in memory order, from one value for each group.
template <typename T, int kAt, int... I>
AMCT_INLINE V<T> of_groups(V<T> v, std::integer_sequence<int, I...>) {
  constexpr int n = kSorted<T>;
  return __builtin_shufflevector(v, v, (I / n * n + kAt * n / 4 + I % n / 4)...);
}

// The same from one value for each member.
template <typename T, int kAt, int... I>
AMCT_INLINE V<T> of_members(const V<T>* v, std::integer_sequence<int, I...> lanes) {
  constexpr V<T> member = {((kAt * kWidth<T> + I) % 4)...};
  return (of_groups<T, kAt>(v[0], lanes) & (member == 0)) | (of_groups<T, kAt>(v[1], lanes) & (member == 1)) |
         (of_groups<T, kAt>(v[2], lanes) & (member == 2)) | (of_groups<T, kAt>(v[3], lanes) & (member == 3));
}

// Four registers of groups that lie side by side.
template <typename T, typename Use>
AMCT_INLINE void mask_neighbours(const T* w, uint8_t* mask, int64_t at, const Use& use) {
  using C = Choice<sizeof(T)>;
  constexpr int width = kWidth<T>;
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  const T* from = w + at;
  const V<T> raw[4] = {load(from), load(from + width), load(from + 2 * width), load(from + 3 * width)};
  const V<T> in[4] = {magnitudes<T>(raw[0]), magnitudes<T>(raw[1]), magnitudes<T>(raw[2]), magnitudes<T>(raw[3])};
  const V<T> even[2] = {every_second<T, 0>(in[0], in[1], lanes), every_second<T, 0>(in[2], in[3], lanes)};
  const V<T> odd[2] = {every_second<T, 1>(in[0], in[1], lanes), every_second<T, 1>(in[2], in[3], lanes)};
  const V<T> m[4] = {every_second<T, 0>(even[0], even[1], lanes), every_second<T, 0>(odd[0], odd[1], lanes),
                     every_second<T, 1>(even[0], even[1], lanes), every_second<T, 1>(odd[0], odd[1], lanes)};
  const auto put = [&](const typename C::Keep* keep) __attribute__((always_inline)) {
    C::put_four(keep, mask + at, width);
    use(raw, keep, at, width);
  };
  V<T> second, exact[4];
  if (second_largest<T>(m, second)) [[likely]] {
    const typename C::Keep keep[4] = {
        C::from(in[0], of_groups<T, 0>(second, lanes)), C::from(in[1], of_groups<T, 1>(second, lanes)),
        C::from(in[2], of_groups<T, 2>(second, lanes)), C::from(in[3], of_groups<T, 3>(second, lanes))};
    put(keep);
  } else {
    chosen_exactly<T>(m, exact);
    const typename C::Keep keep[4] = {
        C::where(of_members<T, 0>(exact, lanes)), C::where(of_members<T, 1>(exact, lanes)),
        C::where(of_members<T, 2>(exact, lanes)), C::where(of_members<T, 3>(exact, lanes))};
    put(keep);
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
  mask_rows(in, bytes, 0, width, MaskOnly{});
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

// Whole groups; returns how many were done. Rows of a register or more: the last register of a row overlaps the one
// before. Shorter rows: what is written beyond a row is overwritten by the rows that follow, which go out in rising
// order, as far as enough of them follow.
template <typename T, typename Use>
AMCT_INLINE int64_t mask_groups(const T* w, uint8_t* mask, int64_t groups, int64_t inner, const Use& use) {
  constexpr int64_t width = kWidth<T>;
  const int64_t size = groups * 4 * inner;
  if (inner == 1) {
    int64_t at = 0;
    for (; at + 4 * width <= size; at += 4 * width) {
      bring_all(w + at, 4 * width);
      use.ask(at, 4 * width);
      mask_neighbours(w, mask, at, use);
    }
    return at / 4;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = g * 4 * inner;
    if (inner < width && start + 3 * inner + width > size) return g;
    bring_all(w + start, 4 * inner);
    use.ask(start, 4 * inner);
    for (int64_t i = 0; i < inner; i += width) {
      const int64_t at = start + (i + width <= inner || inner < width ? i : inner - width);
      mask_rows(w, mask, at, inner, use);
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
    bring<kRegister>(w + i, kLead);
    bring<kRegister>(y + i, kLead);
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
  const int64_t done = mask_groups(w, mask, count / 4, inner, MaskOnly{}), at = 4 * done * inner;
  mask_rest(w + at, mask + at, count - 4 * done, inner);
}

// Rows shorter than a register are masked first: stores that overlap are slower than a loop of their own.
template <typename T>
void sparsify_plane(const void* w_, uint8_t* mask, void* y_, int64_t count, int64_t inner) {
  const T* w = static_cast<const T*>(w_);
  T* y = static_cast<T*>(y_);
  const bool together = count > 2 && (inner == 1 || inner >= kWidth<T>);
  const int64_t groups = together ? mask_groups(w, mask, count / 4, inner, MaskAndApply<T>{y}) : 0;
  const int64_t done = 4 * groups * inner, n = count * inner;
  if (done == n) return;
  mask_plane<T>(w + done, mask + done, count - 4 * groups, inner);
  apply_mask<T>(w + done, mask + done, y + done, n - done);
}

}  // namespace
}  // namespace amct_ext::cpu
