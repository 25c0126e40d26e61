// apply_mask, sparse_arq_fake_quantize and sparse_arq_fake_quantize_2to4.
#include <torch/library.h>

#include <tuple>

#include "cuda/sparsity_mask.cuh"
#include "cuda/sparsity_mask.h"
#include "cuda/weight_arq.h"
#include "cuda/weight_quantize.cuh"
#include "ops/sparsity_check.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

template <typename T>
struct ApplyMask {
  const T* w;
  const bool* mask;
  T* y;

  __device__ int prepare() const { return 0; }
  template <int V>
  __device__ void run(int, int64_t i) const {
    store_vector(y + i, load_masked<V>(w, mask, i));
  }
};

Tensor apply_mask(const Tensor& w, const Tensor& mask) {
  const char* op = "apply_mask";
  check_floating(op, "w", w);
  check_mask(op, mask, w);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), keep = match_mask_layout(mask, source);
  Tensor y = at::empty_like(source);
  if (w.numel() == 0) return y;
  dispatch_floating(w.scalar_type(), [&]<typename T>() {
    const ApplyMask<T> job{static_cast<const T*>(source.const_data_ptr()),
                           static_cast<const bool*>(keep.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr())};
    map<kVecSize<T>>(job, w.numel(), vector_aligned(job.w, job.mask, job.y));
  });
  return y;
}

Tensor apply_mask_sr_ste(const Tensor& w, const Tensor& mask, double decay) {
  check_decaying("apply_mask_sr_ste", w, mask, decay);
  return apply_mask(w, mask);
}

template <typename T>
struct SrSteBackward {
  const T *grad, *w;
  const bool* mask;
  T* d_w;
  Acc<T> decay;

  __device__ int prepare() const { return 0; }
  template <int V>
  __device__ void run(int, int64_t i) const {
    using A = Acc<T>;
    const auto upstream = load_vector<V>(grad + i), in = load_vector<V>(w + i);
    const auto keep = load_vector<V>(mask + i);
    AlignedVector<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A dropped = keep.val[k] ? A(0) : static_cast<A>(in.val[k]);
      out.val[k] = static_cast<T>(static_cast<A>(upstream.val[k]) + decay * dropped);
    }
    store_vector(d_w + i, out);
  }
};

Tensor sr_ste_backward(const Tensor& grad, const Tensor& w, const Tensor& mask, double decay) {
  check_decaying_backward("sr_ste_backward", grad, w, mask, decay);
  const c10::DeviceGuard guard(w.device());
  const Tensor upstream = dense(grad), source = match_layout(w, upstream), keep = match_mask_layout(mask, upstream);
  Tensor d_w = at::empty_like(upstream);
  if (w.numel() == 0) return d_w;
  dispatch_floating(w.scalar_type(), [&]<typename T>() {
    const SrSteBackward<T> job{static_cast<const T*>(upstream.const_data_ptr()),
                               static_cast<const T*>(source.const_data_ptr()),
                               static_cast<const bool*>(keep.const_data_ptr()), static_cast<T*>(d_w.mutable_data_ptr()),
                               static_cast<Acc<T>>(decay)};
    map<kVecSize<T>>(job, w.numel(), vector_aligned(job.grad, job.w, job.mask, job.d_w));
  });
  return d_w;
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                                    std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  check_mask(op, mask, w);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), keep = match_mask_layout(mask, source);
  Tensor y = at::empty_like(source), scale = empty_scales(w, channel_axis);
  if (w.numel() == 0) return {std::move(y), scale.fill_(1)};
  arq_quantize(source, keep, y, scale, static_cast<int>(num_bits), channel_axis);
  return {std::move(y), std::move(scale)};
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize_sr_ste(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                                           std::optional<int64_t> channel_axis, double decay) {
  check_decaying("sparse_arq_fake_quantize_sr_ste", w, mask, decay);
  return sparse_arq_fake_quantize(w, mask, num_bits, channel_axis);
}

// A block per row of the weight: mask and range in one pass, codes in a second one. The second pass computes the mask
// again, which costs less than to read it back.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    sparse_quantize_rows(const T* all_w, bool* all_mask, T* all_y, Acc<T>* scale, AxisView view, int64_t length,
                         int num_bits) {
  using A = Acc<T>;
  AMCT_SHARED(row_scale, A row_scale);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * length, groups = group_count(view);
  const T* w = all_w + begin;
  bool* mask = all_mask + begin;
  T* y = all_y + begin;
  const RangeScale<T> range{w, nullptr, scale, num_bits};
  typename RangeScale<T>::State state = RangeScale<T>::identity();
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < groups; i += blockDim.x) {
    const Group group = group_at(view, i);
    AlignedVector<bool, 4> keep;
    const auto values = load_group(w, group, keep);
    store_group(mask, group, keep);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < group.valid) RangeScale<T>::accumulate_value(state, static_cast<A>(values.val[k]));
    }
  }
  block_reduce<RangeScale<T>>(state);
  if (threadIdx.x == 0) {
    range.finalize(state, blockIdx.x);
    row_scale = scale[blockIdx.x];
  }
  __syncthreads();
  const auto quotient = RoundedQuotient<A, false>::of(row_scale, A(0), num_bits);
  const auto codes = math::code_range(num_bits);
  const A lowest = static_cast<A>(codes.lowest), highest = static_cast<A>(codes.highest);
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < groups; i += blockDim.x) {
    const Group group = group_at(view, i);
    AlignedVector<bool, 4> keep;
    auto values = load_group(w, group, keep);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_code(values.val[k], math::clamp(quotient(static_cast<A>(values.val[k])), lowest, highest), row_scale);
    }
    store_group(y, group, values);
  }
}

// Whether the channels are contiguous rows that hold whole groups, and a block per row fills the GPU.
bool use_block_per_row(const Tensor& source, std::optional<int64_t> channel_axis, int64_t mask_axis) {
  if (channel_axis != 0 || mask_axis == 0) return false;
  const AxisView view = axis_view(source, 0);
  return view.outer == 1 && view.size > 1 && (view.inner <= 16384 || view.size >= 128);
}

std::tuple<Tensor, Tensor, Tensor> sparse_arq_fake_quantize_2to4(const Tensor& w, int64_t axis, int64_t num_bits,
                                                                 std::optional<int64_t> channel_axis) {
  const char* op = "sparse_arq_fake_quantize_2to4";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  axis = check_axis(op, "axis", w, axis);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  const int bits = static_cast<int>(num_bits);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w);
  Tensor y = at::empty_like(source), mask = at::empty_like(source, source.options().dtype(at::kBool));
  Tensor scale = empty_scales(w, channel_axis);
  if (w.numel() == 0) return {std::move(y), scale.fill_(1), std::move(mask)};
  if (!use_block_per_row(source, channel_axis, axis)) {
    make_mask(source, axis, mask, {});
    arq_quantize(source, mask, y, scale, bits, channel_axis);
    return {std::move(y), std::move(scale), std::move(mask)};
  }
  const int64_t rows = w.size(0), length = w.numel() / rows;
  AxisView view = axis_view(source, axis);
  if (w.size(axis) == 1) {
    view = {1, 1, length};
  } else {
    view.outer = length / (view.size * view.inner);
  }
  dispatch_floating(w.scalar_type(), [&]<typename T>() {
    launch(sparse_quantize_rows<T>, rows, block_threads(group_count(view)),
           static_cast<const T*>(source.const_data_ptr()), static_cast<bool*>(mask.mutable_data_ptr()),
           static_cast<T*>(y.mutable_data_ptr()), static_cast<Acc<T>*>(scale.mutable_data_ptr()), view, length, bits);
  });
  return {std::move(y), std::move(scale), std::move(mask)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("apply_mask", apply_mask);
  m.impl("sparse_arq_fake_quantize", sparse_arq_fake_quantize);
  m.impl("sparse_arq_fake_quantize_2to4", sparse_arq_fake_quantize_2to4);
  m.impl("apply_mask_sr_ste", apply_mask_sr_ste);
  m.impl("sparse_arq_fake_quantize_sr_ste", sparse_arq_fake_quantize_sr_ste);
  m.impl("sr_ste_backward", sr_ste_backward);
}

}  // namespace amct_ext::cuda
