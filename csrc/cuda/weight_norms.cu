// filter_norms: the L2 norm of each channel.
#include <torch/library.h>

#include <cmath>

#include "common/check.h"
#include "cuda/engine/reduce.cuh"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

template <typename T>
struct L2Norm : SumReduction {
  struct Constants {};

  const T* w;
  Acc<T>* norm;

  __device__ Constants prepare(int64_t) const { return {}; }

  template <int V>
  __device__ void accumulate(const Constants&, State& state, int64_t i) const {
    const auto in = load_vector<V>(w + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const double v = static_cast<double>(static_cast<Acc<T>>(in.val[k]));
      state.sum += v * v;
    }
  }

  __device__ void finalize(const State& state, int64_t channel) const {
    norm[channel] = static_cast<Acc<T>>(::sqrt(state.sum));
  }
};

Tensor filter_norms(const Tensor& w, int64_t axis) {
  const char* op = "filter_norms";
  check_floating(op, "w", w);
  axis = check_axis(op, "axis", w, axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w);
  Tensor norms = at::empty({w.size(axis)}, w.options().dtype(accumulate_type(w)));
  dispatch_floating(w.scalar_type(), [&]<typename T>() {
    L2Norm<T> job;
    job.w = static_cast<const T*>(source.const_data_ptr());
    job.norm = static_cast<Acc<T>*>(norms.mutable_data_ptr());
    reduce<kVecSize<T>>(job, axis_view(source, axis), vector_aligned(job.w), w.options());
  });
  return norms;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) { m.impl("filter_norms", filter_norms); }

}  // namespace amct_ext::cuda
