// 2:4 sparsity: masks, masked weights, masked and quantised weights. Conventions are in ops.h.
//
// A mask is bool with the shape of its weight, true where the weight is kept. `axis` is the input-channel axis (1 for
// convolutions and Linear, 0 for transposed convolutions); of four neighbours along it the two largest magnitudes stay.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "api.h"  // beside this file, so that installed headers need no include folder of their own

namespace amct_ext {

using at::Tensor;

// The 2:4 mask of w (floating). The last group counts as filled up with zeros; NaN counts as the largest. No gradient.
AMCT_API Tensor mask_2to4(const Tensor& w, int64_t axis = 1);

// Advances mask by one training step: renews it from w where step is a multiple of update_freq (with update_freq 0: at
// step 0 only), then adds one to step (int64 scalar). Both are written to.
AMCT_API void refresh_mask_(const Tensor& w, const Tensor& mask, const Tensor& step, int64_t update_freq,
                            int64_t axis = 1);

// mask in words of 64 values, int64, one dimension, as the record file holds it.
AMCT_API Tensor pack_mask(const Tensor& mask);

// The mask of this shape that pack_mask packed.
AMCT_API Tensor unpack_mask(const Tensor& words, at::IntArrayRef shape);

// w (floating) where mask is true, zero elsewhere, also for NaN and Inf. Gradient: masked.
AMCT_API Tensor apply_mask(const Tensor& w, const Tensor& mask);

// {apply_mask, mask_2to4} of w in one pass. Gradient: masked.
AMCT_API std::tuple<Tensor, Tensor> sparsify_2to4(const Tensor& w, int64_t axis = 1);

// arq_fake_quantize of a masked weight in one pass: {y, scale}. Gradient: masked.
AMCT_API std::tuple<Tensor, Tensor> sparse_arq_fake_quantize(const Tensor& w, const Tensor& mask, int64_t num_bits = 8,
                                                             std::optional<int64_t> channel_axis = std::nullopt);

// mask_2to4 and sparse_arq_fake_quantize with it in one pass: {y, scale, mask}. Gradient: masked.
AMCT_API std::tuple<Tensor, Tensor, Tensor> sparse_arq_fake_quantize_2to4(
    const Tensor& w, int64_t axis = 1, int64_t num_bits = 8, std::optional<int64_t> channel_axis = std::nullopt);

// apply_mask and sparse_arq_fake_quantize with the gradient of SR-STE (Zhou et al. 2021): straight through, also to
// masked weights, plus decay (0 or more) times the weight at those.
AMCT_API Tensor apply_mask_sr_ste(const Tensor& w, const Tensor& mask, double decay = 2e-4);
AMCT_API std::tuple<Tensor, Tensor> sparse_arq_fake_quantize_sr_ste(const Tensor& w, const Tensor& mask,
                                                                    int64_t num_bits = 8,
                                                                    std::optional<int64_t> channel_axis = std::nullopt,
                                                                    double decay = 2e-4);

// That gradient, like grad, from grad, that of the masked weight (shape and type of w).
AMCT_API Tensor sr_ste_backward(const Tensor& grad, const Tensor& w, const Tensor& mask, double decay = 2e-4);

}  // namespace amct_ext
