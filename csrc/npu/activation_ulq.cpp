// ulq_fake_quantize and its backward on Ascend NPUs, through torch_npu's interface for extensions. All work is queued
// on the current stream; no value is read on the host. It is faster than the plain-torch reference for two reasons:
// 8-bit codes take one pass over x instead of four, and nothing is float64, which the vector cores lack.
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/round.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <op_plugin/include/npu_cpp_extension.h>
#include <torch/library.h>

#include <cfloat>
#include <optional>
#include <tuple>

#include "common/check.h"

namespace amct_ext::npu {
namespace {

using at::Tensor;

struct Affine {
  Tensor scale, offset;
};

struct CodeRange {
  int64_t lowest, highest;
};

CodeRange code_range(int64_t num_bits) {
  const int64_t half = int64_t{1} << (num_bits - 1);
  return {-half, half - 1};
}

// The type the op computes in.
at::ScalarType compute_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// A clip as a 0-dim tensor of the compute type.
Tensor as_scalar(const char* op, const char* name, const Tensor& value, at::ScalarType type) {
  check_floating(op, name, value);
  check_scalar(op, name, value);
  return value.reshape({}).to(type);
}

// Scale and offset of a range that contains zero. Divisors are tensors, because a division by a number may be computed
// as a product with its reciprocal.
Affine affine(const Tensor& high, const Tensor& low, int64_t num_bits) {
  const double lowest = static_cast<double>(code_range(num_bits).lowest);
  const Tensor scale = (high - low).div_(at::full_like(high, static_cast<double>((int64_t{1} << num_bits) - 1)));
  const Tensor offset = at::round(lowest - low / scale), small = scale < FLT_EPSILON;
  return {at::where(small, at::ones_like(scale), scale), at::where(small, at::full_like(offset, lowest), offset)};
}

// round(x / scale + offset), saturated to INT8, by the vendor's kernel in one pass.
Tensor quantize_int8(const Tensor& x, const Affine& range) {
  const Tensor scale = range.scale.reshape({1}), offset = range.offset.reshape({1}).to(at::kInt);
  Tensor codes = at::empty_like(x, x.options().dtype(at::kChar));
  const aclDataType type = ACL_INT8;
  const int32_t axis = 0;  // ignored where there is one scale
  EXEC_NPU_CMD_EXT(aclnnQuantize, x, scale, offset, type, axis, codes);
  return codes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_forward(const Tensor& x, const Tensor& clip_max,
                                                                       const Tensor& clip_min,
                                                                       const Tensor& prev_clip_max,
                                                                       const Tensor& prev_clip_min, int64_t num_bits,
                                                                       bool fixed_min) {
  const char* op = "ulq_fake_quantize";
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  const at::ScalarType type = compute_type(x);
  Tensor high = as_scalar(op, "clip_max", clip_max, type), low = as_scalar(op, "clip_min", clip_min, type);
  const Tensor prev_high = as_scalar(op, "prev_clip_max", prev_clip_max, type),
               prev_low = as_scalar(op, "prev_clip_min", prev_clip_min, type);
  if (fixed_min) low = at::zeros_like(low);
  const Tensor collapsed = high - low <= FLT_EPSILON;
  const Tensor take_high = at::isfinite(prev_high) & (collapsed | (high < 0)),
               take_low = at::isfinite(prev_low) & (collapsed | (low > 0));
  high = at::where(take_high, prev_high, high).clamp_min_(0);
  low = (fixed_min ? low : at::where(take_low, prev_low, low)).clamp_max_(0);
  const Affine range = affine(high, low, num_bits);

  const Tensor v = x.to(type);
  Tensor y;
  if (num_bits == 8 && type == at::kFloat && x.dim() > 0 && x.dim() <= 8 && x.numel() > 0) {
    y = at::sub(quantize_int8(v, range), range.offset);
  } else {
    const auto [lowest, highest] = code_range(num_bits);
    y = at::div(v, range.scale).add_(range.offset).round_().clamp_(lowest, highest).sub_(range.offset);
  }
  y.mul_(range.scale);
  const Tensor valid = at::isfinite(v).all() & at::isfinite(range.scale) & (range.scale > 0);
  const auto result = [&](const Tensor& value) { return value.to(clip_max.options(), false, /*copy=*/true); };
  return {y.to(x.scalar_type()), result(range.scale), result(range.offset), result(high), result(low), ~valid};
}

// A sum in two stages, rows of 1024 first. In float32 the error of one long sum would grow with its length.
Tensor two_stage_sum(const Tensor& terms) {
  constexpr int64_t kRow = 1024;
  const Tensor flat = terms.reshape({-1});
  return at::constant_pad_nd(flat, {0, (kRow - flat.numel() % kRow) % kRow}).view({-1, kRow}).sum(1).sum();
}

std::tuple<Tensor, Tensor, Tensor> ulq_backward(const Tensor& grad, const Tensor& x, const Tensor& clip_max,
                                                const Tensor& clip_min, int64_t num_bits) {
  const char* op = "ulq_fake_quantize_backward";
  check_floating(op, "grad", grad);
  check_floating(op, "x", x);
  check_bits(op, num_bits);
  check_same_shape(op, "grad", grad, "x", x);
  const at::ScalarType type = compute_type(x);
  const Tensor high = as_scalar(op, "clip_max", clip_max, type), low = as_scalar(op, "clip_min", clip_min, type);
  const Affine range = affine(high, low, num_bits);
  const auto [lowest, highest] = code_range(num_bits);

  const Tensor v = x.to(type), upstream = grad.to(type);
  const Tensor above = v > range.scale * (static_cast<double>(highest) - range.offset),
               below = v < range.scale * (static_cast<double>(lowest) - range.offset);
  const Tensor z = at::where(above, high, at::where(below, low, v)).div_(range.scale);
  const Tensor levels = at::full_like(high, static_cast<double>((int64_t{1} << num_bits) - 1));
  const Tensor error = two_stage_sum(at::round(z).sub_(z).mul_(upstream)).div_(levels), none = at::zeros_like(high);
  const Tensor d_max = error + two_stage_sum(at::where(above, upstream, none)),
               d_min = two_stage_sum(at::where(below, upstream, none)) - error;
  const Tensor dx = at::where(above | below, at::zeros({}, grad.options()), grad);
  const auto result = [&](const Tensor& value) { return value.to(clip_max.options()); };
  return {dx, result(d_max), result(d_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, PrivateUse1, m) {
  m.impl("ulq_fake_quantize", ulq_forward);
  m.impl("ulq_fake_quantize_backward", ulq_backward);
}

}  // namespace amct_ext::npu
