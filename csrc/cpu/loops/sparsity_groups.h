// 2:4 masks a vector of groups at a time: how the members of groups come to lie in lanes, and the sinks that take what
// is kept.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/loop_params.h"
#include "cpu/loops/sparsity_keep_mask.h"
#include "cpu/loops/weight_range.h"
#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

// Prefetches what follows `n` values at the prefetch distance.
template <typename T>
AMCT_INLINE void prefetch_span(const T* from, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) prefetch<1>(from + i, kPrefetchDistance);
}

// A sink takes each vector of weights with its keep mask; it may get a vector twice, and vectors may overlap.
//   prefetch(at, n)      before the values [at, at + n) are masked
//   (raw, keep, at)      a vector that begins at `at`
//   without_range()      the sink to use where values come twice and must not count in a range
//   add_span_to_range(b, e)      values [b, e) that the sink without range got
struct MaskSink {
  AMCT_INLINE void prefetch(int64_t, int64_t) {}
  AMCT_INLINE void operator()(auto, auto, int64_t) {}
  AMCT_INLINE MaskSink& without_range() { return *this; }
  AMCT_INLINE void add_span_to_range(int64_t, int64_t) {}
};

// Writes the weights with +0 where they are not kept.
template <typename T>
struct ApplySink {
  using K = KeepMask<sizeof(T)>;
  T* y;
  AMCT_INLINE void prefetch(int64_t at, int64_t n) { prefetch_span(y + at, n); }
  AMCT_INLINE void operator()(IVec<T> raw, typename K::Keep keep, int64_t at) { store(y + at, K::apply(raw, keep)); }
  AMCT_INLINE ApplySink& without_range() { return *this; }
  AMCT_INLINE void add_span_to_range(int64_t, int64_t) {}
};

// Also takes the range of what it writes.
template <typename T>
struct ApplyAndRangeSink : ApplySink<T> {
  using K = KeepMask<sizeof(T)>;
  RangeTracker<T> range = {};
  AMCT_INLINE void operator()(IVec<T> raw, typename K::Keep keep, int64_t at) {
    ApplySink<T>::operator()(raw, keep, at);
    range.add(K::apply(raw, keep));
  }
  AMCT_INLINE void add_span_to_range(int64_t begin, int64_t end) {
    range.template add_all<false>(this->y + begin, nullptr, end - begin);
  }
};

// Writes the mask of four vectors, the first at `at` and `stride` apart, and hands them to the sink.
template <typename T, typename Sink>
AMCT_INLINE void emit4(const IVec<T>* raw, const typename KeepMask<sizeof(T)>::Keep* keep, uint8_t* mask, int64_t at,
                       int64_t stride, Sink& sink) {
  KeepMask<sizeof(T)>::store4(mask + at, keep, stride);
  for (int r = 0; r < 4; ++r) sink(raw[r], keep[r], at + r * stride);
}

// A vector of groups whose members lie `inner` apart, the first at `at`.
template <typename T, typename Sink>
AMCT_INLINE void mask_4_rows(const T* w, uint8_t* mask, int64_t at, int64_t inner, Sink& sink) {
  const T* from = w + at;
  const IVec<T> raw[4] = {load_bits(from), load_bits(from + inner), load_bits(from + 2 * inner),
                          load_bits(from + 3 * inner)};
  keep_2of4<T>(raw,
               [&](const auto* keep) __attribute__((always_inline)) { emit4<T>(raw, keep, mask, at, inner, sink); });
}

// Four rows of `inner` values. Of rows of a vector or more the last vector overlaps the one before. Of shorter rows a
// vector writes beyond the row; the rows that follow overwrite that, being written in rising order, but it must not
// count in a range.
template <typename T, typename Sink>
AMCT_INLINE void mask_group(const T* w, uint8_t* mask, int64_t start, int64_t inner, Sink& sink) {
  constexpr int64_t width = kLanes<T>;
  if (inner < width) {
    mask_4_rows(w, mask, start, inner, sink.without_range());
    sink.add_span_to_range(start, start + 4 * inner);
    return;
  }
  for (int64_t i = 0; i < inner; i += width) {
    mask_4_rows(w, mask, start + (i + width <= inner ? i : inner - width), inner, sink);
  }
}

// Contiguous groups are deinterleaved within lanes of 128 bits, which is cheaper than across them; a group of float64
// fills two of these.
template <typename T>
constexpr int kShuffleLanes = sizeof(T) == 8 ? kLanes<T> : 16 / static_cast<int>(sizeof(T));

// Every second value of two vectors, from the first (kFirst = 0) or from the second one on.
template <typename T, int kFirst, int... I>
AMCT_INLINE IVec<T> deinterleave(IVec<T> a, IVec<T> b, std::integer_sequence<int, I...>) {
  constexpr int n = kShuffleLanes<T>;
  using Shuffled = std::conditional_t<sizeof(T) == 4, Vec<float>, IVec<T>>;  // of floats it is one instruction
  return bit_cast<IVec<T>>(
      __builtin_shufflevector(bit_cast<Shuffled>(a), bit_cast<Shuffled>(b),
                              (I / n * n + I % n * 2 % n + kFirst + (I % n < n / 2 ? 0 : kLanes<T>))...));
}

// Vector kAt of four in memory order, from one value for each group.
template <typename T, int kAt, int... I>
AMCT_INLINE IVec<T> spread_groups(IVec<T> v, std::integer_sequence<int, I...>) {
  constexpr int n = kShuffleLanes<T>;
  return __builtin_shufflevector(v, v, (I / n * n + kAt * n / 4 + I % n / 4)...);
}

// The same from one value for each member of a group.
template <typename T, int kAt, int... I>
AMCT_INLINE IVec<T> spread_members(const IVec<T>* v, std::integer_sequence<int, I...> lanes) {
  constexpr IVec<T> member = {((kAt * kLanes<T> + I) % 4)...};
  return (spread_groups<T, kAt>(v[0], lanes) & (member == 0)) | (spread_groups<T, kAt>(v[1], lanes) & (member == 1)) |
         (spread_groups<T, kAt>(v[2], lanes) & (member == 2)) | (spread_groups<T, kAt>(v[3], lanes) & (member == 3));
}

// Four vectors of groups whose members are neighbours in memory.
template <typename T, typename Sink>
AMCT_INLINE void mask_contiguous(const T* w, uint8_t* mask, int64_t at, Sink& sink) {
  using K = KeepMask<sizeof(T)>;
  constexpr int width = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  const T* from = w + at;
  const IVec<T> raw[4] = {load_bits(from), load_bits(from + width), load_bits(from + 2 * width),
                          load_bits(from + 3 * width)};
  const IVec<T> in[4] = {abs_bits<T>(raw[0]), abs_bits<T>(raw[1]), abs_bits<T>(raw[2]), abs_bits<T>(raw[3])};
  const IVec<T> even[2] = {deinterleave<T, 0>(in[0], in[1], lanes), deinterleave<T, 0>(in[2], in[3], lanes)};
  const IVec<T> odd[2] = {deinterleave<T, 1>(in[0], in[1], lanes), deinterleave<T, 1>(in[2], in[3], lanes)};
  const IVec<T> m[4] = {deinterleave<T, 0>(even[0], even[1], lanes), deinterleave<T, 0>(odd[0], odd[1], lanes),
                        deinterleave<T, 1>(even[0], even[1], lanes), deinterleave<T, 1>(odd[0], odd[1], lanes)};
  const auto emit = [&](const typename K::Keep* keep)
                        __attribute__((always_inline)) { emit4<T>(raw, keep, mask, at, width, sink); };
  IVec<T> second, exact[4];
  if (!any_lane(second_largest<T>(m, second))) [[likely]] {
    const typename K::Keep keep[4] = {
        K::at_least(in[0], spread_groups<T, 0>(second, lanes)), K::at_least(in[1], spread_groups<T, 1>(second, lanes)),
        K::at_least(in[2], spread_groups<T, 2>(second, lanes)), K::at_least(in[3], spread_groups<T, 3>(second, lanes))};
    emit(keep);
  } else {
    keep_2of4_with_nan<T>(m, exact);
    const typename K::Keep keep[4] = {
        K::from_lanes(spread_members<T, 0>(exact, lanes)), K::from_lanes(spread_members<T, 1>(exact, lanes)),
        K::from_lanes(spread_members<T, 2>(exact, lanes)), K::from_lanes(spread_members<T, 3>(exact, lanes))};
    emit(keep);
  }
}

}  // namespace
}  // namespace amct_ext::cpu
