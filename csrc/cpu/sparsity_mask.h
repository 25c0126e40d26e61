// The 2:4 mask of a weight, shared by the ops that apply it at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace amct_ext::cpu {

// `source` is dense; `mask` (bool) and `y` (like source, optional: the kept weights, zero elsewhere) share its
// layout.
void make_mask(const at::Tensor& source, int64_t axis, const at::Tensor& mask, const std::optional<at::Tensor>& y);

}  // namespace amct_ext::cpu
