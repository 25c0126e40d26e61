// The 2:4 rule. It is stated in amct_ext/ops/sparsity_mask.py; magnitudes are compared as bit patterns, which orders
// NaN last.
#pragma once

#include "cuda/engine/launch.cuh"

namespace amct_ext::cuda {

// All NaN are equal and larger than infinity.
template <typename T>
AMCT_INLINE Bits<Acc<T>> magnitude_order(T v) {
  using B = Bits<Acc<T>>;
  constexpr B kInfinity = sizeof(B) == 8 ? static_cast<B>(0x7ff0000000000000ull) : static_cast<B>(0x7f800000u);
  const B bits = as<B>(static_cast<Acc<T>>(v)) & static_cast<B>(~B{0} >> 1);
  return bits > kInfinity ? kInfinity + 1 : bits;
}

// Sets what is dropped of four neighbours to zero and says what is kept, a byte for each.
template <typename T>
AMCT_INLINE Packet<bool, 4> keep_two(Packet<T, 4>& w) {
  const auto a = magnitude_order(w.v[0]), b = magnitude_order(w.v[1]), c = magnitude_order(w.v[2]),
             d = magnitude_order(w.v[3]);
  Packet<bool, 4> keep{{(b > a) + (c > a) + (d > a) < 2, (a >= b) + (c > b) + (d > b) < 2,
                        (a >= c) + (b >= c) + (d > c) < 2, (a >= d) + (b >= d) + (c >= d) < 2}};
  if (a < b && a < c && a < d) {
    const bool all_equal = b == c && c == d;
    const bool drop_b = b <= c && b <= d && !all_equal, drop_c = (c < b && c <= d) || all_equal;
    keep = {{false, !drop_b, !drop_c, drop_b || drop_c}};
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) w.v[k] = keep.v[k] ? w.v[k] : T(0);
  return keep;
}

// Where a group of four lies: `present` elements, `stride` apart.
struct Group {
  int64_t first, stride;
  int present;
  bool whole;  // too few weights along the axis: all are kept
};

// Group number i of a dense tensor; groups run along the axis of `view`.
AMCT_INLINE Group group_at(const AxisView& view, int64_t i) {
  const int64_t groups = (view.size + 3) / 4, row = i / view.inner, g = row % groups;
  const int64_t left = view.size - 4 * g;
  return {((row / groups) * view.size + 4 * g) * view.inner + i - row * view.inner, view.inner,
          left < 4 ? static_cast<int>(left) : 4, view.size <= 2};
}

AMCT_INLINE int64_t group_count(const AxisView& view) { return view.outer * ((view.size + 3) / 4) * view.inner; }

// The weights of a group with what is dropped made zero; padded with zeros that take part in the choice.
template <typename T>
__device__ __forceinline__ Packet<T, 4> load_group(const T* w, const Group& group, Packet<bool, 4>& keep) {
  Packet<T, 4> values;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    values.v[k] = k < group.present ? load<1>(w + group.first + k * group.stride).v[0] : T(0);
  }
  if (group.whole) {
    keep = {{true, true, true, true}};
  } else {
    keep = keep_two(values);
  }
  return values;
}

template <typename T>
__device__ __forceinline__ void store_group(T* to, const Group& group, const Packet<T, 4>& values) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < group.present) to[group.first + k * group.stride] = values.v[k];
  }
}

}  // namespace amct_ext::cuda
