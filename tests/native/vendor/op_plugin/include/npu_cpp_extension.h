// Replaces torch_npu's header of this name, so that csrc/npu runs on the stand-in device. Each vendor operator is
// written in ATen after its documentation, and checks the limits stated there.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/div.h>
#include <ATen/ops/round.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>

// The names and numbers of acl/acl_base.h.
enum aclDataType { ACL_INT8 = 2 };

#define EXEC_NPU_CMD_EXT(api, ...) standin_vendor::api(__VA_ARGS__)

namespace standin_vendor {

inline std::atomic<int64_t> calls{0};

// round(x / scales + zero_points), on Atlas A2: one to eight dimensions; float32 x with float32 scales; integer zero
// points; INT8 out.
inline void aclnnQuantize(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& zero_points,
                          aclDataType type, int32_t axis, at::Tensor& out) {
  TORCH_CHECK(x.dim() >= 1 && x.dim() <= 8 && axis < x.dim() && axis >= -x.dim(), "aclnnQuantize: dimensions");
  TORCH_CHECK(x.scalar_type() == at::kFloat && scales.scalar_type() == at::kFloat, "aclnnQuantize: x, scales");
  TORCH_CHECK(zero_points.scalar_type() == at::kInt && scales.sizes() == zero_points.sizes(), "aclnnQuantize: zeros");
  TORCH_CHECK(scales.dim() == 1 && scales.numel() == 1, "aclnnQuantize: only a single scale is needed here");
  TORCH_CHECK(type == ACL_INT8 && out.scalar_type() == at::kChar && out.sizes() == x.sizes(), "aclnnQuantize: out");
  out.copy_(at::clamp(at::round(at::add(at::div(x, scales), zero_points)), -128, 127));
  ++calls;
}

TORCH_LIBRARY(standin_vendor, m) {
  m.def("calls", [] { return calls.load(); });
}

}  // namespace standin_vendor
