// mask_2to4, refresh_mask_, pack_mask, unpack_mask.
#include "cpu/sparsity_mask.h"

#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "common/layout.h"
#include "cpu/parallel.h"
#include "cpu/result_pool.h"
#include "cpu/tensor_access.h"
#include "ops/sparsity_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

constexpr int64_t kChunk = 2048;  // weights masked at a time; they stay in the L1 cache

Tensor mask_2to4(const Tensor& w, int64_t axis) {
  check_floating("mask_2to4", "w", w);
  axis = check_axis("mask_2to4", "axis", w, axis);
  const Tensor source = dense(w);
  Tensor mask = pooled_like(source, Lifetime::kStep, at::kBool);
  make_mask(source, axis, mask, std::nullopt);
  return mask;
}

void refresh_mask_(const Tensor& w, const Tensor& mask, const Tensor& step, int64_t update_freq, int64_t axis) {
  axis = check_refresh("refresh_mask_", w, mask, step, update_freq, axis);
  int64_t& count = *static_cast<int64_t*>(step.mutable_data_ptr());
  if (update_freq == 0 ? count == 0 : count % update_freq == 0) {
    const Tensor source = dense(w);
    if (mask.strides() == source.strides()) {
      make_mask(source, axis, mask, std::nullopt);
    } else {
      mask.copy_(mask_2to4(source, axis));
    }
  }
  ++count;
}

Tensor pack_mask(const Tensor& mask) {
  check_type("pack_mask", "mask", mask, at::kBool);
  const Tensor flat = mask.contiguous();
  const int64_t n = flat.numel(), words = (n + 63) / 64;
  Tensor packed = at::empty({words}, mask.options().dtype(at::kLong));
  const uint8_t* in = static_cast<const uint8_t*>(flat.const_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  for_rows(words, 64, [&](int64_t word) {
    for (int64_t byte = word * 8; byte < word * 8 + 8; ++byte) {
      unsigned bits = 0;
      for (int64_t i = byte * 8; i < byte * 8 + 8; ++i) bits = bits << 1 | (i < n && in[i] != 0);
      out[byte] = static_cast<uint8_t>(bits);
    }
  });
  return packed;
}

Tensor unpack_mask(const Tensor& words, at::IntArrayRef shape) {
  check_words("unpack_mask", words, shape);
  const int64_t n = c10::multiply_integers(shape);
  Tensor mask = at::empty(shape, words.options().dtype(at::kBool));
  const Tensor packed = words.contiguous();
  const uint8_t* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  for_blocks(n, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = in[i >> 3] >> (7 - (i & 7)) & 1;
  });
  return mask;
}

}  // namespace

void make_mask(const Tensor& source, int64_t axis, const Tensor& mask, const std::optional<Tensor>& y) {
  AxisView view = axis_view(source, axis);
  // One or two weights along the axis are all kept, however the tensor is split.
  if (view.size <= 2) view = {view.outer * view.size, 1, view.inner};
  const size_t size = source.element_size();
  const void* in = source.const_data_ptr();
  uint8_t* keep = static_cast<uint8_t*>(mask.mutable_data_ptr());
  void* out = y ? y->mutable_data_ptr() : nullptr;
  const auto mask_plane = loops().mask_plane[element_of(source)];
  const auto sparsify = loops().sparsify_plane[element_of(source)];
  // A few groups at a time: so threads also share one long plane, and a mask is applied while its weights are in the L1
  // cache.
  const int64_t group = 4 * view.inner, groups = (view.size + 3) / 4;
  const int64_t step = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, group));
  const int64_t chunks = (groups + step - 1) / step;
  for_rows(view.outer * chunks, step * group, [&](int64_t i) {
    const int64_t first = i % chunks * step * 4, count = std::min(view.size - first, step * 4);
    const int64_t at = (i / chunks * view.size + first) * view.inner;
    if (out) {
      sparsify(element_ptr(in, at, size), keep + at, element_ptr(out, at, size), count, view.inner);
    } else {
      mask_plane(element_ptr(in, at, size), keep + at, count, view.inner);
    }
  });
}

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("mask_2to4", mask_2to4);
  m.impl("refresh_mask_", refresh_mask_);
  m.impl("pack_mask", pack_mask);
  m.impl("unpack_mask", unpack_mask);
}

}  // namespace amct_ext::cpu
