// What the weight kernels share: the range of a channel, symmetric quantisation of every element.
#pragma once

#include "cuda/engine/map.cuh"
#include "cuda/engine/reduce.cuh"
#include "cuda/engine/round.cuh"

namespace amct_ext::cuda {

// Elements with those that a mask drops made zero; without a mask, all of them.
template <int V, typename T>
__device__ __forceinline__ Packet<T, V> load_kept(const T* w, const bool* mask, int64_t i) {
  auto packet = load<V>(w + i);
  if (mask != nullptr) {
    const auto keep = load<V>(mask + i);
#pragma unroll
    for (int k = 0; k < V; ++k) packet.v[k] = keep.v[k] ? packet.v[k] : T(0);
  }
  return packet;
}

// A reduction to the largest and the smallest value; both NaN where one value is NaN.
template <typename T>
struct Range {
  using A = Acc<T>;

  struct State {
    A largest, smallest;
  };

  struct Local {};

  const T* w;
  const bool* mask;
  A* scale;
  int num_bits;

  AMCT_INLINE static State identity() { return {-static_cast<A>(INFINITY), static_cast<A>(INFINITY)}; }

  AMCT_INLINE static void join(State& into, const State& other) {
    into.largest = other.largest > into.largest || other.largest != other.largest ? other.largest : into.largest;
    into.smallest = other.smallest < into.smallest || other.smallest != other.smallest ? other.smallest : into.smallest;
  }

  AMCT_INLINE static void include(State& state, A v) { join(state, {v, v}); }

  __device__ Local prepare(int64_t) const { return {}; }

  template <int V>
  __device__ void add(const Local&, State& state, int64_t i) const {
    const auto in = load_kept<V>(w, mask, i);
#pragma unroll
    for (int k = 0; k < V; ++k) include(state, static_cast<A>(in.v[k]));
  }

  __device__ void finish(const State& state, int64_t channel) const {
    scale[channel] = math::symmetric_scale(state.largest, state.smallest, num_bits);
  }
};

template <typename T>
AMCT_INLINE void put(T& y, Acc<T> code, Acc<T> scale) {
  y = static_cast<T>(code * scale);
}
template <typename A>
AMCT_INLINE void put(int8_t& y, A code, A) {
  y = static_cast<int8_t>(static_cast<int>(code == code ? code : A(0)));
}

// An elementwise job: codes times scale, or the codes themselves as int8.
template <typename T, typename Out>
struct Symmetric {
  using A = Acc<T>;

  struct Local {
    Nearest<A, false> nearest;
    A lowest, highest;
  };

  const T* w;
  const bool* mask;
  Out* y;
  Value scale;
  AxisView view;
  A least;  // scales below count as this
  int num_bits;

  __device__ Nearest<A, false> nearest(int64_t channel) const {
    const A value = math::at_least(static_cast<A>(read(scale, channel)), least);
    return Nearest<A, false>::of(value, A(0), num_bits);
  }

  __device__ Local prepare() const {
    const auto range = math::code_range(num_bits);
    const auto single = view.size == 1 ? nearest(0) : Nearest<A, false>{};
    return {single, static_cast<A>(range.lowest), static_cast<A>(range.highest)};
  }

  __device__ bool wanted(const Local&) const { return true; }

  template <int V>
  __device__ void run(const Local& local, int64_t i) const {
    const auto in = load_kept<V>(w, mask, i);
    Packet<Out, V> out;
    auto current = local.nearest;
    int64_t channel = 0, left = V;
    if (view.size > 1) {
      const int64_t segment = i / view.inner;
      channel = segment % view.size;
      left = (segment + 1) * view.inner - i;
      current = nearest(channel);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (left == 0) {  // a run ends inside the packet
        channel = channel + 1 == view.size ? 0 : channel + 1;
        left = view.inner;
        current = nearest(channel);
      }
      --left;
      const A code = math::clamp(current(static_cast<A>(in.v[k])), local.lowest, local.highest);
      if constexpr (std::is_same_v<Out, int8_t>) {
        put<A>(out.v[k], code, current.scale);
      } else {
        put<Out>(out.v[k], code, current.scale);
      }
    }
    store(y + i, out);
  }
};

}  // namespace amct_ext::cuda
