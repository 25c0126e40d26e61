// Integer products: layers computed on 8-bit codes, with exact sums. Conventions are in ops.h.
//
// Codes of activations are uint8 and hold code + 128; x_scale and x_offset are those of ulq_quantize. packed and sums
// are those of pack_weight, w_scale is the scale given to it. Sums fit 32 bits up to 65793 weights per output channel.
// None of these ops has a gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "api.h"  // beside this file, so that installed headers need no include folder of their own

namespace amct_ext {

using at::Tensor;

// The codes that ulq_fake_quantize rounds x to; arguments as there, num_bits 2 to 8.
// Returns {codes, scale, offset, clip_max, clip_min, invalid}: codes uint8 with the shape of x, channels_last where it
// has four dimensions; the rest as ulq_fake_quantize.
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_quantize(
    const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max,
    const Tensor& prev_clip_min, int64_t num_bits = 8, bool fixed_min = false);

// The codes of a weight (floating, (outputs, inputs) or (outputs, inputs, height, width)) in the order in which the
// products read them; scale: one value or one per output channel; num_bits 2 to 8.
// Returns {packed, int8 (blocks of 16 outputs, taps, groups of 4 inputs, 16, 4), padded with zeros; sums, int32
// (outputs,)}.
AMCT_API std::tuple<Tensor, Tensor> pack_weight(const Tensor& w, const Tensor& scale, int64_t num_bits = 8);

// 2-D convolution of codes (images, channels, height, width), times both scales, plus bias (one value per output
// channel), rounded to float32 once. Then addend (float32, shape of the result) is added and the bounds lowest and
// highest are applied, where given. channels_last: memory layout of the result.
AMCT_API Tensor integer_conv2d(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                               const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias,
                               at::IntArrayRef kernel_size, at::IntArrayRef stride = {1, 1},
                               at::IntArrayRef padding = {0, 0}, at::IntArrayRef dilation = {1, 1},
                               bool channels_last = false, const std::optional<Tensor>& addend = std::nullopt,
                               std::optional<double> lowest = std::nullopt,
                               std::optional<double> highest = std::nullopt);

// ulq_quantize of integer_conv2d, whose floats are never written. Arguments as there, results as ulq_quantize.
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> integer_conv2d_codes(
    const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed, const Tensor& sums,
    const Tensor& w_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, std::optional<double> lowest, std::optional<double> highest,
    const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max, const Tensor& prev_clip_min,
    int64_t num_bits = 8, bool fixed_min = false);

// Linear layer on codes (..., inputs), as integer_conv2d: float32 (..., outputs).
AMCT_API Tensor integer_linear(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                               const Tensor& sums, const Tensor& w_scale,
                               const std::optional<Tensor>& bias = std::nullopt);

// The sums of integer_conv2d before scales and bias: int32 (images, outputs, height, width) in channels_last memory.
AMCT_API Tensor integer_conv2d_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                            const Tensor& sums, at::IntArrayRef kernel_size,
                                            at::IntArrayRef stride = {1, 1}, at::IntArrayRef padding = {0, 0},
                                            at::IntArrayRef dilation = {1, 1});

// The sums of integer_linear before scales and bias: int32 (..., outputs).
AMCT_API Tensor integer_linear_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                            const Tensor& sums);

}  // namespace amct_ext
