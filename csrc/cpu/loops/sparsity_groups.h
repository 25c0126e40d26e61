// 2:4 masks: a register of groups at a time, how groups come to lie in its lanes, and what is done with what is kept.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/loops/sparsity_keep_mask.h"
#include "cpu/loops/weight_range.h"
#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

// Asks for the memory a lead ahead of `n` values.
template <typename T>
AMCT_INLINE void bring_all(const T* at, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) bring<1>(at + i, kLead);
}

// What else is done with a register of weights once it is known what of it is kept, and with values that no register
// takes. A register may come twice, and may overlap another.
struct MaskOnly {
  AMCT_INLINE void ask(int64_t, int64_t) {}
  AMCT_INLINE void operator()(auto, auto, int64_t) {}
  AMCT_INLINE MaskOnly& store() { return *this; }  // without what else is made of the values
  AMCT_INLINE void values(int64_t, int64_t) {}
};

// Weights that are not kept become +0.
template <typename T>
struct MaskAndApply {
  using C = Choice<sizeof(T)>;
  T* y;
  AMCT_INLINE void ask(int64_t at, int64_t n) { bring_all(y + at, n); }
  AMCT_INLINE void operator()(V<T> raw, typename C::Keep keep, int64_t at) { store_row(y + at, C::kept(raw, keep)); }
  AMCT_INLINE MaskAndApply& store() { return *this; }
  AMCT_INLINE void values(int64_t, int64_t) {}
};

// The range of what is stored is taken.
template <typename T>
struct MaskApplyAndRange : MaskAndApply<T> {
  using C = Choice<sizeof(T)>;
  Extremes<T> extremes = {};
  AMCT_INLINE void operator()(V<T> raw, typename C::Keep keep, int64_t at) {
    MaskAndApply<T>::operator()(raw, keep, at);
    extremes.add(C::kept(raw, keep));
  }
  AMCT_INLINE void values(int64_t begin, int64_t end) {
    extremes.template add_all<false>(this->y + begin, nullptr, end - begin);
  }
};

// Four registers, `apart`, of which the first begins at `at`.
template <typename T, typename Use>
AMCT_INLINE void put_four(const V<T>* raw, const typename Choice<sizeof(T)>::Keep* keep, uint8_t* mask, int64_t at,
                          int64_t apart, Use& use) {
  Choice<sizeof(T)>::put_four(keep, mask + at, apart);
  for (int r = 0; r < 4; ++r) use(raw[r], keep[r], at + r * apart);
}

// Four rows of a register of groups, `inner` apart, of which the first begins at `at`.
template <typename T, typename Use>
AMCT_INLINE void mask_rows(const T* w, uint8_t* mask, int64_t at, int64_t inner, Use& use) {
  const T* from = w + at;
  const V<T> raw[4] = {load(from), load(from + inner), load(from + 2 * inner), load(from + 3 * inner)};
  choose<T>(raw,
            [&](const auto* keep) __attribute__((always_inline)) { put_four<T>(raw, keep, mask, at, inner, use); });
}

// One group of rows. Of rows of a register or more the last register overlaps the one before; what is written beyond
// shorter rows is overwritten by the rows that follow, which go out in rising order, and must not count in a range.
template <typename T, typename Use>
AMCT_INLINE void mask_group(const T* w, uint8_t* mask, int64_t start, int64_t inner, Use& use) {
  constexpr int64_t width = kWidth<T>;
  if (inner < width) {
    mask_rows(w, mask, start, inner, use.store());
    use.values(start, start + 4 * inner);
    return;
  }
  for (int64_t i = 0; i < inner; i += width) {
    mask_rows(w, mask, start + (i + width <= inner ? i : inner - width), inner, use);
  }
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
AMCT_INLINE void mask_neighbours(const T* w, uint8_t* mask, int64_t at, Use& use) {
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
  const auto put = [&](const typename C::Keep* keep)
                       __attribute__((always_inline)) { put_four<T>(raw, keep, mask, at, width, use); };
  V<T> second, exact[4];
  if (!somewhere(second_largest<T>(m, second))) [[likely]] {
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

}  // namespace
}  // namespace amct_ext::cpu
