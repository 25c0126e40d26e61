// The 2:4 rule for a group of four, as amct_ext/ops/sparsity_mask.py states it, and where the groups of a tensor lie.
#pragma once

#include "cuda/engine/memory.cuh"

namespace amct_ext::cuda {

// Keys that compare as magnitudes do; all NaN are equal and larger than infinity.
template <typename T>
AMCT_INLINE Bits<Acc<T>> magnitude_key(T v) {
  using B = Bits<Acc<T>>;
  constexpr B kInfBits = sizeof(B) == 8 ? static_cast<B>(0x7ff0000000000000ull) : static_cast<B>(0x7f800000u);
  const B bits = abs_bits(static_cast<Acc<T>>(v));
  return bits > kInfBits ? kInfBits + 1 : bits;
}

// Returns the keep mask of four neighbours and sets those it drops to zero.
template <typename T>
AMCT_INLINE AlignedVector<bool, 4> keep_2of4(AlignedVector<T, 4>& w) {
  const auto a = magnitude_key(w.val[0]), b = magnitude_key(w.val[1]), c = magnitude_key(w.val[2]),
             d = magnitude_key(w.val[3]);
  AlignedVector<bool, 4> keep{{(b > a) + (c > a) + (d > a) < 2, (a >= b) + (c > b) + (d > b) < 2,
                               (a >= c) + (b >= c) + (d > c) < 2, (a >= d) + (b >= d) + (c >= d) < 2}};
  if (a < b && a < c && a < d) {
    const bool all_equal = b == c && c == d;
    const bool drop_b = b <= c && b <= d && !all_equal, drop_c = (c < b && c <= d) || all_equal;
    keep = {{false, !drop_b, !drop_c, drop_b || drop_c}};
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) w.val[k] = keep.val[k] ? w.val[k] : T(0);
  return keep;
}

// Where a group lies: `valid` elements (less than four at the end of the axis), `stride` apart.
struct Group {
  int64_t first, stride;
  int valid;
  bool keep_all;  // an axis of one or two elements is not pruned
};

// Group number i of a dense tensor; groups run along the axis of `view`.
AMCT_INLINE Group group_at(const AxisView& view, int64_t i) {
  const int64_t groups = (view.size + 3) / 4, row = i / view.inner, g = row % groups;
  const int64_t left = view.size - 4 * g;
  return {((row / groups) * view.size + 4 * g) * view.inner + i - row * view.inner, view.inner,
          left < 4 ? static_cast<int>(left) : 4, view.size <= 2};
}

AMCT_INLINE int64_t group_count(const AxisView& view) { return view.outer * ((view.size + 3) / 4) * view.inner; }

// The weights of a group, those that are dropped made zero. A short group is padded with zeros, which compete for the
// two places like any other value.
template <typename T>
__device__ __forceinline__ AlignedVector<T, 4> load_group(const T* w, const Group& group,
                                                          AlignedVector<bool, 4>& keep) {
  AlignedVector<T, 4> values;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    values.val[k] = k < group.valid ? load_scalar(w + group.first + k * group.stride) : T(0);
  }
  if (group.keep_all) {
    keep = {{true, true, true, true}};
  } else {
    keep = keep_2of4(values);
  }
  return values;
}

template <typename T>
__device__ __forceinline__ void store_group(T* to, const Group& group, const AlignedVector<T, 4>& values) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < group.valid) to[group.first + k * group.stride] = values.val[k];
  }
}

}  // namespace amct_ext::cuda
