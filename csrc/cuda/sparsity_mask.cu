// mask_2to4, refresh_mask_, sparsify_2to4, pack_mask, unpack_mask.
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <tuple>

#include "common/check.h"
#include "cuda/engine/map.cuh"
#include "cuda/sparsity_mask.cuh"
#include "cuda/sparsity_mask.h"

namespace amct_ext::cuda {
namespace {

using at::Tensor;

// Whether it is time for a new mask; always, without a counter.
struct Due {
  const int64_t* step;
  int64_t update_freq;

  __device__ bool prepare() const {
    return step == nullptr || (update_freq == 0 ? *step == 0 : *step % update_freq == 0);
  }
  __device__ bool wanted(bool due) const { return due; }
};

// Groups that lie together and are all full: whole packets of them.
template <typename T>
struct FlatGroups : Due {
  const T* w;
  bool* mask;
  T* y;

  template <int V>
  __device__ void run(bool, int64_t i) const {
    auto values = load<V>(w + i);
    Packet<bool, V> keep;
#pragma unroll
    for (int g = 0; g < V; g += 4) {
      Packet<T, 4> four{{values.v[g], values.v[g + 1], values.v[g + 2], values.v[g + 3]}};
      const auto kept = keep_two(four);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        values.v[g + k] = four.v[k];
        keep.v[g + k] = kept.v[k];
      }
    }
    store(mask + i, keep);
    if (y != nullptr) store(y + i, values);
  }
};

// A group per thread, neighbouring threads on neighbouring elements.
template <typename T>
struct AnyGroups : Due {
  const T* w;
  bool* mask;
  T* y;
  AxisView view;

  template <int V>
  __device__ void run(bool, int64_t i) const {
    static_assert(V == 1);
    const Group group = group_at(view, i);
    Packet<bool, 4> keep;
    const auto values = load_group(w, group, keep);
    store_group(mask, group, keep);
    if (y != nullptr) store_group(y, group, values);
  }
};

struct CountUp {
  int64_t* step;

  __device__ int prepare() const { return 0; }
  __device__ bool wanted(int) const { return true; }
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

void refresh_mask(const Tensor& w, const Tensor& mask, const Tensor& step, int64_t update_freq, int64_t axis) {
  const char* op = "refresh_mask_";
  check_floating(op, "w", w);
  check_type(op, "mask", mask, at::kBool);
  check_type(op, "step", step, at::kLong);
  check_same_shape(op, "mask", mask, "w", w);
  check_scalar(op, "step", step);
  check_device(op, "mask", mask, "w", w);
  check_device(op, "step", step, "w", w);
  TORCH_CHECK_VALUE(update_freq >= 0, op, ": update_freq must be 0 or more, not ", update_freq);
  axis = check_axis(op, "axis", w, axis);
  const c10::DeviceGuard guard(w.device());
  const Tensor source = dense(w), mine = match_mask_layout(mask, source);
  make_mask(source, axis, mine, {}, step, update_freq);
  if (!mine.is_same(mask)) mask.copy_(mine);
  // Every block above has read the counter before this launch begins.
  launch(map_kernel<1, 1, CountUp>, 1, kWarp, CountUp{static_cast<int64_t*>(step.mutable_data_ptr())}, int64_t{1});
}

struct Pack {
  const bool* mask;
  uint8_t* bytes;
  int64_t count;

  __device__ int prepare() const { return 0; }
  __device__ bool wanted(int) const { return true; }
  template <int V>
  __device__ void run(int, int64_t i) const {
    unsigned bits = 0;
    for (int64_t k = i * 8; k < i * 8 + 8; ++k) bits = bits << 1 | (k < count && mask[k] ? 1u : 0u);
    bytes[i] = static_cast<uint8_t>(bits);
  }
};

struct Unpack {
  const uint8_t* bytes;
  bool* mask;

  __device__ int prepare() const { return 0; }
  __device__ bool wanted(int) const { return true; }
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
  const Pack job{static_cast<const bool*>(flat.const_data_ptr()), static_cast<uint8_t*>(packed.mutable_data_ptr()),
                 flat.numel()};
  map_packets<1, 1>(job, words * 8);
  return packed;
}

Tensor unpack_mask(const Tensor& words, at::IntArrayRef shape) {
  const char* op = "unpack_mask";
  check_type(op, "words", words, at::kLong);
  const int64_t n = c10::multiply_integers(shape), needed = ceil_div(n, 64);
  TORCH_CHECK_VALUE(words.dim() == 1 && words.numel() == needed, op, ": a mask of shape ", shape, " takes ", needed,
                    " words in one dimension, not shape ", words.sizes());
  const c10::DeviceGuard guard(words.device());
  Tensor mask = at::empty(shape, words.options().dtype(at::kBool));
  const Tensor packed = words.contiguous();
  const Unpack job{static_cast<const uint8_t*>(packed.const_data_ptr()), static_cast<bool*>(mask.mutable_data_ptr())};
  map_packets<1, 1>(job, n);
  return mask;
}

}  // namespace

void make_mask(const Tensor& source, int64_t axis, const Tensor& mask, const Tensor& y, const Tensor& step,
               int64_t update_freq) {
  if (source.numel() == 0) return;
  const Due due{step.defined() ? static_cast<const int64_t*>(step.const_data_ptr()) : nullptr, update_freq};
  const AxisView view = axis_view(source, axis);
  by_type(source.scalar_type(), [&]<typename T>() {
    const T* w = static_cast<const T*>(source.const_data_ptr());
    bool* keep = static_cast<bool*>(mask.mutable_data_ptr());
    T* out = y.defined() ? static_cast<T*>(y.mutable_data_ptr()) : nullptr;
    if (view.inner == 1 && view.size % 4 == 0 && aligned(w, keep, out)) {
      FlatGroups<T> job;
      static_cast<Due&>(job) = due;
      job.w = w, job.mask = keep, job.y = out;
      map_packets < kPacket<T><4 ? 4 : kPacket<T>, 4>(job, source.numel());
    } else {
      AnyGroups<T> job;
      static_cast<Due&>(job) = due;
      job.w = w, job.mask = keep, job.y = out, job.view = view;
      map_packets<1, 1>(job, group_count(view));
    }
  });
}

TORCH_LIBRARY_IMPL(amct_ext, AMCT_DEVICE_KEY, m) {
  m.impl("mask_2to4", mask_2to4);
  m.impl("refresh_mask_", refresh_mask);
  m.impl("sparsify_2to4", sparsify_2to4);
  m.impl("pack_mask", pack_mask);
  m.impl("unpack_mask", unpack_mask);
}

}  // namespace amct_ext::cuda
