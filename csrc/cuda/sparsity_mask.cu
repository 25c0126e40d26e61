// mask_2to4, refresh_mask_, sparsify_2to4, pack_mask, unpack_mask.
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/engine/map.cuh"
#include "cuda/sparsity_mask.cuh"
#include "cuda/sparsity_mask.h"
#include "ops/sparsity_check.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

// Whether a refresh is due at the present step; always, without a step counter.
struct RefreshIfDue {
  const int64_t* step;
  int64_t update_freq;

  __device__ bool prepare() const {
    return step == nullptr || (update_freq == 0 ? *step == 0 : *step % update_freq == 0);
  }
  __device__ bool enabled(bool due) const { return due; }
};

// Groups of four contiguous elements: vectors of whole groups.
template <typename T>
struct ContiguousGroups : RefreshIfDue {
  const T* w;
  bool* mask;
  T* y;

  template <int V>
  __device__ void run(bool, int64_t i) const {
    auto values = load_vector<V>(w + i);
    AlignedVector<bool, V> keep;
#pragma unroll
    for (int g = 0; g < V; g += 4) {
      AlignedVector<T, 4> four{{values.val[g], values.val[g + 1], values.val[g + 2], values.val[g + 3]}};
      const auto four_keep = keep_2of4(four);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        values.val[g + k] = four.val[k];
        keep.val[g + k] = four_keep.val[k];
      }
    }
    store_vector(mask + i, keep);
    if (y != nullptr) store_vector(y + i, values);
  }
};

// Groups of any stride, one per thread. Neighbouring threads take neighbouring elements, so that accesses coalesce.
template <typename T>
struct StridedGroups : RefreshIfDue {
  const T* w;
  bool* mask;
  T* y;
  AxisView view;

  template <int V>
  __device__ void run(bool, int64_t i) const {
    static_assert(V == 1);
    const Group group = group_at(view, i);
    AlignedVector<bool, 4> keep;
    const auto values = load_group(w, group, keep);
    store_group(mask, group, keep);
    if (y != nullptr) store_group(y, group, values);
  }
};

struct IncrementStep {
  int64_t* step;

  __device__ int prepare() const { return 0; }
  template <int V>
  __device__ void run(int, int64_t) const {
    *step += 1;
  }
};

Tensor mask_2to4(const Tensor& w, int64_t axis) {
  check_floating("mask_2to4", "w", w);
  axis = check_axis("mask_2to4", "axis", w, axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w);
  Tensor mask = at::empty_like(source, source.options().dtype(at::kBool));
  make_mask(source, axis, mask, {});
  return mask;
}

std::tuple<Tensor, Tensor> sparsify_2to4(const Tensor& w, int64_t axis) {
  const char* op = "sparsify_2to4";
  check_floating(op, "w", w);
  axis = check_axis(op, "axis", w, axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w);
  Tensor y = at::empty_like(source), mask = at::empty_like(source, source.options().dtype(at::kBool));
  make_mask(source, axis, mask, y);
  return {std::move(y), std::move(mask)};
}

void refresh_mask_(const Tensor& w, const Tensor& mask, const Tensor& step, int64_t update_freq, int64_t axis) {
  axis = check_refresh("refresh_mask_", w, mask, step, update_freq, axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), dense_mask = match_mask_layout(mask, source);
  make_mask(source, axis, dense_mask, {}, step, update_freq);
  if (!dense_mask.is_same(mask)) mask.copy_(dense_mask);
  // A launch of its own: in stream order after all blocks above have read the counter.
  map_in_one_warp(IncrementStep{static_cast<int64_t*>(step.mutable_data_ptr())}, int64_t{1});
}

// A byte per thread, the first element in its highest bit.
struct PackBits {
  const bool* mask;
  uint8_t* bytes;
  int64_t count;

  __device__ int prepare() const { return 0; }
  template <int V>
  __device__ void run(int, int64_t i) const {
    unsigned bits = 0;
    for (int64_t k = i * 8; k < i * 8 + 8; ++k) bits = bits << 1 | (k < count && mask[k] ? 1u : 0u);
    bytes[i] = static_cast<uint8_t>(bits);
  }
};

struct UnpackBits {
  const uint8_t* bytes;
  bool* mask;

  __device__ int prepare() const { return 0; }
  template <int V>
  __device__ void run(int, int64_t i) const {
    mask[i] = (bytes[i >> 3] >> (7 - (i & 7)) & 1) != 0;
  }
};

Tensor pack_mask(const Tensor& mask) {
  check_type("pack_mask", "mask", mask, at::kBool);
  const c10::DeviceGuard guard(mask.device());
  const Tensor flat = mask.contiguous();
  const int64_t words = ceil_div(flat.numel(), 64);
  Tensor packed = at::empty({words}, mask.options().dtype(at::kLong));
  const PackBits job{static_cast<const bool*>(flat.const_data_ptr()), static_cast<uint8_t*>(packed.mutable_data_ptr()),
                     flat.numel()};
  launch_map<1, 1>(job, words * 8);
  return packed;
}

Tensor unpack_mask(const Tensor& words, at::IntArrayRef shape) {
  check_words("unpack_mask", words, shape);
  const int64_t n = c10::multiply_integers(shape);
  const c10::DeviceGuard guard(words.device());
  Tensor mask = at::empty(shape, words.options().dtype(at::kBool));
  const Tensor packed = words.contiguous();
  const UnpackBits job{static_cast<const uint8_t*>(packed.const_data_ptr()),
                       static_cast<bool*>(mask.mutable_data_ptr())};
  launch_map<1, 1>(job, n);
  return mask;
}

}  // namespace

void make_mask(const Tensor& source, int64_t axis, const Tensor& mask, const Tensor& y, const Tensor& step,
               int64_t update_freq) {
  if (source.numel() == 0) return;
  const RefreshIfDue due{step.defined() ? static_cast<const int64_t*>(step.const_data_ptr()) : nullptr, update_freq};
  const AxisView view = axis_view(source, axis);
  dispatch_floating(source.scalar_type(), [&]<typename T>() {
    const T* w = static_cast<const T*>(source.const_data_ptr());
    bool* keep = static_cast<bool*>(mask.mutable_data_ptr());
    T* out = y.defined() ? static_cast<T*>(y.mutable_data_ptr()) : nullptr;
    if (view.inner == 1 && view.size % 4 == 0 && vector_aligned(w, keep, out)) {
      constexpr int kVectorOfGroups = std::max(kVecSize<T>, 4);
      ContiguousGroups<T> job;
      static_cast<RefreshIfDue&>(job) = due;
      job.w = w, job.mask = keep, job.y = out;
      launch_map<kVectorOfGroups, 4>(job, source.numel());
    } else {
      StridedGroups<T> job;
      static_cast<RefreshIfDue&>(job) = due;
      job.w = w, job.mask = keep, job.y = out, job.view = view;
      launch_map<1, 1>(job, group_count(view));
    }
  });
}

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("mask_2to4", mask_2to4);
  m.impl("refresh_mask_", refresh_mask_);
  m.impl("sparsify_2to4", sparsify_2to4);
  m.impl("pack_mask", pack_mask);
  m.impl("unpack_mask", unpack_mask);
}

}  // namespace amct_ext::cuda
