// Symmetric quantisation with one scale per channel, or one for all.
#pragma once

#include "cuda/engine/map.cuh"
#include "cuda/engine/round.cuh"
#include "cuda/weight_range.cuh"

namespace amct_ext::cuda {

// The code itself as int8, a NaN as 0; any other type stores code times scale.
template <typename Out, typename A>
AMCT_INLINE void store_code(Out& y, A code, A scale) {
  if constexpr (std::is_same_v<Out, int8_t>) {
    y = static_cast<int8_t>(static_cast<int>(code == code ? code : A(0)));
  } else {
    y = static_cast<Out>(code * scale);
  }
}

// An elementwise job: fake-quantised weights where Out is T, codes where it is int8_t.
template <typename T, typename Out>
struct SymmetricQuantize {
  using A = Acc<T>;

  struct Constants {
    RoundedQuotient<A, false> quotient;
    A lowest, highest;
  };

  const T* w;
  const bool* mask;
  Out* y;
  ConstScalars scale;
  AxisView view;
  A min_scale;  // smaller scales are raised to it
  int num_bits;

  __device__ RoundedQuotient<A, false> channel_quotient(int64_t channel) const {
    const A value = math::at_least(static_cast<A>(fetch_and_cast(scale, channel)), min_scale);
    return RoundedQuotient<A, false>::of(value, A(0), num_bits);
  }

  __device__ Constants prepare() const {
    const auto range = math::code_range(num_bits);
    const auto single = view.size == 1 ? channel_quotient(0) : RoundedQuotient<A, false>{};
    return {single, static_cast<A>(range.lowest), static_cast<A>(range.highest)};
  }

  template <int V>
  __device__ void run(const Constants& constants, int64_t i) const {
    const auto in = load_masked<V>(w, mask, i);
    AlignedVector<Out, V> out;
    auto current = constants.quotient;
    int64_t channel = 0, left = V;
    if (view.size > 1) {
      const int64_t segment = i / view.inner;
      channel = segment % view.size;
      left = (segment + 1) * view.inner - i;
      current = channel_quotient(channel);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (left == 0) {  // a run ends inside the vector
        channel = channel + 1 == view.size ? 0 : channel + 1;
        left = view.inner;
        current = channel_quotient(channel);
      }
      --left;
      const A code = math::clamp(current(static_cast<A>(in.val[k])), constants.lowest, constants.highest);
      store_code(out.val[k], code, current.scale);
    }
    store_vector(y + i, out);
  }
};

// Quantises the dense `w`, not empty, into `y` of the same layout.
template <typename T, typename Out>
void launch_quantize(const at::Tensor& w, const bool* mask, const at::Tensor& y, const at::Tensor& scale,
                     const AxisView& view, Acc<T> min_scale, int num_bits) {
  const SymmetricQuantize<T, Out> job{static_cast<const T*>(w.const_data_ptr()),
                                      mask,
                                      static_cast<Out*>(y.mutable_data_ptr()),
                                      const_scalars(scale),
                                      view,
                                      min_scale,
                                      num_bits};
  map<kVecSize<T>>(job, w.numel(), vector_aligned(job.w, job.mask, job.y));
}

}  // namespace amct_ext::cuda
