// ulq_fake_quantize and its backward.
#include <torch/library.h>

#include <array>
#include <atomic>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/reuse.h"
#include "cpu/tensors.h"
#include "quant_math.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

template <typename Acc>
math::Affine<Acc> scalars(std::array<double, 4> clips, int num_bits, bool fixed_min, double& high, double& low) {
  Acc clip_max = static_cast<Acc>(clips[0]), clip_min = static_cast<Acc>(clips[1]);
  math::effective_clips(clip_max, clip_min, static_cast<Acc>(clips[2]), static_cast<Acc>(clips[3]), fixed_min);
  high = clip_max;
  low = clip_min;
  return math::affine(clip_max, clip_min, num_bits);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& clip_max,
                                                                   const Tensor& clip_min, const Tensor& prev_clip_max,
                                                                   const Tensor& prev_clip_min, int64_t num_bits,
                                                                   bool fixed_min) {
  const char* op = "ulq_fake_quantize";
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  const std::array<const Tensor*, 4> clips{&clip_max, &clip_min, &prev_clip_max, &prev_clip_min};
  const std::array<const char*, 4> names{"clip_max", "clip_min", "prev_clip_max", "prev_clip_min"};
  std::array<double, 4> values;
  for (size_t i = 0; i < clips.size(); ++i) {
    check_floating(op, names[i], *clips[i]);
    check_scalar(op, names[i], *clips[i]);
    values[i] = value_at(*clips[i], 0);
  }
  const int bits = static_cast<int>(num_bits);
  double high = 0, low = 0, scale = 0, offset = 0;
  if (wide(x)) {
    const auto affine = scalars<double>(values, bits, fixed_min, high, low);
    scale = affine.scale;
    offset = affine.offset;
  } else {
    const auto affine = scalars<float>(values, bits, fixed_min, high, low);
    scale = affine.scale;
    offset = affine.offset;
  }
  const math::CodeRange range = math::code_range(bits);
  const UlqForward parameters{scale, offset, range.lowest, range.highest};

  const Tensor source = in_runs(x);
  Tensor y = reused_like(source);
  std::atomic<bool> bad{!(math::is_finite(scale) && scale > 0)};
  const void* in = source.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const size_t size = x.element_size();
  const auto loop = kernels().ulq_forward[element_of(x)];
  for_walk(Walk(x.sizes(), source.strides(), y.strides()), [&](int64_t, int64_t from, int64_t to, int64_t n) {
    if (loop(at_element(in, from, size), at_element(out, to, size), n, parameters)) {
      bad.store(true, std::memory_order_relaxed);
    }
  });
  Tensor invalid = new_scalar(at::kBool);
  *static_cast<bool*>(invalid.mutable_data_ptr()) = bad.load();
  return {std::move(y),
          scalar_like(clip_max, scale),
          scalar_like(clip_max, offset),
          scalar_like(clip_max, high),
          scalar_like(clip_max, low),
          std::move(invalid)};
}

template <typename Acc>
UlqBackward limits(double clip_max, double clip_min, int num_bits) {
  const Acc high = static_cast<Acc>(clip_max), low = static_cast<Acc>(clip_min);
  const auto affine = math::affine(high, low, num_bits);
  const math::CodeRange range = math::code_range(num_bits);
  return {affine.scale, high, low, affine.scale * (static_cast<Acc>(range.highest) - affine.offset),
          affine.scale * (static_cast<Acc>(range.lowest) - affine.offset)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& clip_max,
                                            const Tensor& clip_min, int64_t num_bits) {
  const char* op = "ulq_fake_quantize_backward";
  check_floating(op, "grad", grad);
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  check_floating(op, "clip_max", clip_max);
  check_floating(op, "clip_min", clip_min);
  check_scalar(op, "clip_max", clip_max);
  check_scalar(op, "clip_min", clip_min);
  check_same_shape(op, "grad", grad, "x", x);
  const int bits = static_cast<int>(num_bits);
  const double high = value_at(clip_max, 0), low = value_at(clip_min, 0);
  const UlqBackward parameters = wide(x) ? limits<double>(high, low, bits) : limits<float>(high, low, bits);

  const Tensor source = in_runs(x);
  Tensor dx = reused_like(source);
  const Tensor upstream = laid_out_as(grad, dx);
  const Walk walk(x.sizes(), source.strides(), dx.strides());
  std::vector<UlqSums> parts(walk.blocks());
  const void *in = source.const_data_ptr(), *up = upstream.const_data_ptr();
  void* out = dx.mutable_data_ptr();
  const size_t size = x.element_size();
  const auto loop = kernels().ulq_backward[element_of(x)];
  for_walk(walk, [&](int64_t block, int64_t from, int64_t to, int64_t n) {
    loop(at_element(up, to, size), at_element(in, from, size), at_element(out, to, size), n, parameters, parts[block]);
  });
  UlqSums sums;
  for (const UlqSums& part : parts) {
    sums.error += part.error;
    sums.above += part.above;
    sums.below += part.below;
  }
  const double error = sums.error / static_cast<double>((1LL << num_bits) - 1);
  if (grad.scalar_type() != x.scalar_type()) dx = dx.to(grad.scalar_type());
  return {std::move(dx), scalar_like(clip_max, error + sums.above), scalar_like(clip_min, sums.below - error)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("ulq_fake_quantize", forward);
  m.impl("ulq_fake_quantize_backward", backward);
}

}  // namespace amct_ext::cpu
