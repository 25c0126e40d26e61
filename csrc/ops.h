// The ops for C++: plain functions that go through the dispatcher, so any device and autograd work.
// Schemas stand in ops.cpp, descriptions in amct_ext/ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#define AMCT_API __attribute__((visibility("default")))

namespace amct_ext {

using at::Tensor;

AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_fake_quantize(
    const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max,
    const Tensor& prev_clip_min, int64_t num_bits = 8, bool fixed_min = false);
AMCT_API std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_(const Tensor& x, const Tensor& clip_max,
                                                               const Tensor& clip_min, const Tensor& prev_clip_max,
                                                               const Tensor& prev_clip_min, const Tensor& scale,
                                                               const Tensor& offset, const Tensor& invalid,
                                                               int64_t num_bits = 8, bool fixed_min = false);
AMCT_API std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                                       const Tensor& clip_max, const Tensor& clip_min,
                                                                       int64_t num_bits = 8);
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor> search_clip_range(const Tensor& x, int64_t num_bits = 8,
                                                                      bool with_offset = false);

AMCT_API void range_histogram_(const Tensor& x, const Tensor& histogram, const Tensor& extremes);
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> search_clip_range_histogram(const Tensor& histogram,
                                                                                        const Tensor& extremes,
                                                                                        int64_t num_bits = 8);

AMCT_API std::tuple<Tensor, Tensor> arq_fake_quantize(const Tensor& w, int64_t num_bits = 8,
                                                      std::optional<int64_t> channel_axis = std::nullopt);
AMCT_API Tensor lsq_fake_quantize(const Tensor& w, const Tensor& scale, int64_t num_bits = 8,
                                  std::optional<int64_t> channel_axis = std::nullopt,
                                  std::optional<double> grad_factor = std::nullopt);
AMCT_API Tensor lsq_fake_quantize_backward(const Tensor& grad, const Tensor& w, const Tensor& scale,
                                           int64_t num_bits = 8, std::optional<int64_t> channel_axis = std::nullopt,
                                           std::optional<double> grad_factor = std::nullopt);
AMCT_API Tensor quantize_weight(const Tensor& w, const Tensor& scale, int64_t num_bits = 8,
                                std::optional<int64_t> channel_axis = std::nullopt);

AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_quantize(
    const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max,
    const Tensor& prev_clip_min, int64_t num_bits = 8, bool fixed_min = false);
AMCT_API std::tuple<Tensor, Tensor> pack_weight(const Tensor& w, const Tensor& scale, int64_t num_bits = 8);
AMCT_API Tensor integer_conv2d(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                               const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias,
                               at::IntArrayRef kernel_size, at::IntArrayRef stride = {1, 1},
                               at::IntArrayRef padding = {0, 0}, at::IntArrayRef dilation = {1, 1},
                               bool channels_last = false, const std::optional<Tensor>& addend = std::nullopt,
                               std::optional<double> lowest = std::nullopt,
                               std::optional<double> highest = std::nullopt);
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> integer_conv2d_codes(
    const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed, const Tensor& sums,
    const Tensor& w_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, std::optional<double> lowest, std::optional<double> highest,
    const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max, const Tensor& prev_clip_min,
    int64_t num_bits = 8, bool fixed_min = false);
AMCT_API Tensor integer_linear(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                               const Tensor& sums, const Tensor& w_scale,
                               const std::optional<Tensor>& bias = std::nullopt);
AMCT_API Tensor integer_conv2d_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                            const Tensor& sums, at::IntArrayRef kernel_size,
                                            at::IntArrayRef stride = {1, 1}, at::IntArrayRef padding = {0, 0},
                                            at::IntArrayRef dilation = {1, 1});
AMCT_API Tensor integer_linear_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                            const Tensor& sums);

AMCT_API std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_fake_quantize_many(at::TensorList weights,
                                                                                     int64_t num_bits,
                                                                                     at::IntArrayRef channel_axes);

AMCT_API Tensor apply_mask(const Tensor& w, const Tensor& mask);
AMCT_API std::tuple<Tensor, Tensor> sparsify_2to4(const Tensor& w, int64_t axis = 1);
AMCT_API std::tuple<Tensor, Tensor> sparse_arq_fake_quantize(const Tensor& w, const Tensor& mask, int64_t num_bits = 8,
                                                             std::optional<int64_t> channel_axis = std::nullopt);
AMCT_API std::tuple<Tensor, Tensor, Tensor> sparse_arq_fake_quantize_2to4(
    const Tensor& w, int64_t axis = 1, int64_t num_bits = 8, std::optional<int64_t> channel_axis = std::nullopt);

AMCT_API Tensor mask_2to4(const Tensor& w, int64_t axis = 1);
AMCT_API void refresh_mask_(const Tensor& w, const Tensor& mask, const Tensor& step, int64_t update_freq,
                            int64_t axis = 1);
AMCT_API Tensor pack_mask(const Tensor& mask);
AMCT_API Tensor unpack_mask(const Tensor& words, at::IntArrayRef shape);
AMCT_API Tensor filter_norms(const Tensor& w, int64_t axis = 0);

AMCT_API void shift_error_(const Tensor& x, const Tensor& deq_scale, const Tensor& errors, int64_t channel_axis = 1);
AMCT_API Tensor best_shift(const Tensor& errors);

}  // namespace amct_ext
