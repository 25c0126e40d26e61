// Weights: fake quantisation with the scale of their range (ARQ) or learned scales (LSQ). Conventions are in ops.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "api.h"  // beside this file, so that installed headers need no include folder of their own

namespace amct_ext {

using at::Tensor;

// Fake-quantises w (floating) with the scale of its own range, symmetric.
// Returns {y like w, scale of shape (channels,) or (1,), float32, for a float64 weight float64}. The scale is not
// finite where its channel is not; it is 1, and y zero, where the range is too small for a scale. Gradient: straight
// through.
AMCT_API std::tuple<Tensor, Tensor> arq_fake_quantize(const Tensor& w, int64_t num_bits = 8,
                                                      std::optional<int64_t> channel_axis = std::nullopt);

// arq_fake_quantize of many weights in one call. channel_axes: one per weight, -1 for one scale.
// Returns {all y, all scales}. Gradients: straight through.
AMCT_API std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_fake_quantize_many(at::TensorList weights,
                                                                                     int64_t num_bits,
                                                                                     at::IntArrayRef channel_axes);

// Fake-quantises w (floating) with learned scales (floating, one value or one per channel; FLT_EPSILON at least).
// grad_factor multiplies the gradient of the scale; std::nullopt: 1/sqrt(weights per scale * (2^(num_bits-1) - 1)).
// Returns y like w. Gradients: w straight through; the scale the rounding errors inside the range, the end codes
// outside.
AMCT_API Tensor lsq_fake_quantize(const Tensor& w, const Tensor& scale, int64_t num_bits = 8,
                                  std::optional<int64_t> channel_axis = std::nullopt,
                                  std::optional<double> grad_factor = std::nullopt);

// The gradient of the scale of lsq_fake_quantize, like scale, from grad, that of y (shape of w).
AMCT_API Tensor lsq_fake_quantize_backward(const Tensor& grad, const Tensor& w, const Tensor& scale,
                                           int64_t num_bits = 8, std::optional<int64_t> channel_axis = std::nullopt,
                                           std::optional<double> grad_factor = std::nullopt);

// The codes of w, int8 with its shape; arguments as lsq_fake_quantize, num_bits 2 to 8. NaN gives 0. No gradient.
AMCT_API Tensor quantize_weight(const Tensor& w, const Tensor& scale, int64_t num_bits = 8,
                                std::optional<int64_t> channel_axis = std::nullopt);

// The scales of least squared error of w (floating): shape (channels,) or (1,), float32, for a float64 weight float64.
// num_bits 2 to 8. mask: bool, shape of w; what it drops counts as zero. As the scale of arq_fake_quantize where a
// channel is not finite or its range too small. No gradient.
AMCT_API Tensor search_weight_scale(const Tensor& w, int64_t num_bits = 8,
                                    std::optional<int64_t> channel_axis = std::nullopt,
                                    const std::optional<Tensor>& mask = std::nullopt);

// Sets each scale (as lsq_fake_quantize takes it) with which less than a tenth of its channel's norm would be left to
// the scale of the channel's range; all others stay as they are, and those of channels whose range is no finite number
// or too small for a scale. num_bits 2 to 8.
AMCT_API void repair_weight_scale_(const Tensor& w, const Tensor& scale, int64_t num_bits = 8,
                                   std::optional<int64_t> channel_axis = std::nullopt);

// The L2 norm of each slice of w (floating) along an axis: shape (channels,), float32, for a float64 weight float64.
// No gradient.
AMCT_API Tensor filter_norms(const Tensor& w, int64_t axis = 0);

}  // namespace amct_ext
