// The range of a weight's channels, with or without a mask.
#pragma once

#include "cuda/engine/reduce.cuh"

namespace amct_ext::cuda {

// Elements i .. i+V-1, zero where the mask is false. Without a mask (nullptr) all are kept.
template <int V, typename T>
__device__ __forceinline__ AlignedVector<T, V> load_masked(const T* w, const bool* mask, int64_t i) {
  auto vector = load_vector<V>(w + i);
  if (mask != nullptr) {
    const auto keep = load_vector<V>(mask + i);
#pragma unroll
    for (int k = 0; k < V; ++k) vector.val[k] = keep.val[k] ? vector.val[k] : T(0);
  }
  return vector;
}

// A reduction to max and min of a channel, both NaN if a value is NaN; writes the symmetric scale that they give.
template <typename T>
struct RangeScale {
  using A = Acc<T>;

  struct State {
    A max, min;
  };

  struct Constants {};

  const T* w;
  const bool* mask;
  A* scale;
  int num_bits;

  AMCT_INLINE static State identity() { return {-static_cast<A>(INFINITY), static_cast<A>(INFINITY)}; }

  AMCT_INLINE static void combine(State& into, const State& other) {
    into.max = other.max > into.max || other.max != other.max ? other.max : into.max;
    into.min = other.min < into.min || other.min != other.min ? other.min : into.min;
  }

  AMCT_INLINE static void accumulate_value(State& state, A v) { combine(state, {v, v}); }

  __device__ Constants prepare(int64_t) const { return {}; }

  template <int V>
  __device__ void accumulate(const Constants&, State& state, int64_t i) const {
    const auto in = load_masked<V>(w, mask, i);
#pragma unroll
    for (int k = 0; k < V; ++k) accumulate_value(state, static_cast<A>(in.val[k]));
  }

  __device__ void finalize(const State& state, int64_t channel) const {
    scale[channel] = math::symmetric_scale(state.max, state.min, num_bits);
  }
};

}  // namespace amct_ext::cuda
