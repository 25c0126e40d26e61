// Activations: fake quantisation between two learned clips (ULQ). Conventions are in ops.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <tuple>

#include "api.h"  // beside this file, so that installed headers need no include folder of their own

namespace amct_ext {

using at::Tensor;

// Fake-quantises x (floating, any shape) between clip_max and clip_min (floating scalars).
//
// The previous clips (floating scalars, NaN for none) are used where the new ones have collapsed or changed sign.
// fixed_min takes clip_min as 0.
// Returns {y like x, scale, offset, clip_max, clip_min, invalid}: the clips as used, scalars in the clips' dtype;
// invalid, bool, is true where x holds NaN or Inf or the scale is not finite.
// Gradients: x straight through inside the clips; each clip the rounding error and what was cut off at its side.
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_fake_quantize(
    const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max,
    const Tensor& prev_clip_min, int64_t num_bits = 8, bool fixed_min = false);

// ulq_fake_quantize that writes the state of a quantiser: all four clips become those used, scale and offset (floating
// scalars) likewise, invalid (bool scalar) becomes true where the result is not valid and else stays.
// Returns {y like x, used_max, used_min}, the clips used as tensors of their own. Gradients as ulq_fake_quantize.
AMCT_API std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_(const Tensor& x, const Tensor& clip_max,
                                                               const Tensor& clip_min, const Tensor& prev_clip_max,
                                                               const Tensor& prev_clip_min, const Tensor& scale,
                                                               const Tensor& offset, const Tensor& invalid,
                                                               int64_t num_bits = 8, bool fixed_min = false);

// Gradients of ulq_fake_quantize from grad, that of y (shape of x), and the clips that the forward returned.
// Returns {dx in the dtype of grad, d_clip_max, d_clip_min in the clips' dtype}.
AMCT_API std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                                       const Tensor& clip_max, const Tensor& clip_min,
                                                                       int64_t num_bits = 8);

// The last two of these alone, for float32. Has no gradient.
AMCT_API std::tuple<Tensor, Tensor> ulq_clip_gradients(const Tensor& grad, const Tensor& x, const Tensor& clip_max,
                                                       const Tensor& clip_min, int64_t num_bits = 8);

// The gradient of a ReLU's input, for a ReLU whose result y (float32) is fake-quantised and also read by others: grad
// is the gradient of the quantised values, addend (shape of y) that of y from the others, or none. Clips as above. Has
// no gradient.
AMCT_API Tensor ulq_relu_backward(const Tensor& grad, const Tensor& y, const std::optional<Tensor>& addend,
                                  const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits = 8);

// Statistics of x (float32, more than one value a channel) along axis 1: {mean, 1 / sqrt(variance + eps)}, float32.
// Updates the running ones, where there are, as torch's BatchNorm does. Has no gradient.
AMCT_API std::tuple<Tensor, Tensor> batch_norm_statistics_(const Tensor& x, const std::optional<Tensor>& running_mean,
                                                           const std::optional<Tensor>& running_var, double momentum,
                                                           double eps);

// BatchNorm along axis 1, an addition where there is an addend (shape of x), and an activation function, in one pass
// over x (float32). Arguments as batch_norm_ulq. Has no gradient.
AMCT_API Tensor batch_norm_activation(const Tensor& x, const Tensor& mean, const Tensor& invstd,
                                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                      c10::string_view activation, std::optional<double> lowest,
                                      std::optional<double> highest,
                                      const std::optional<Tensor>& addend = std::nullopt);

// Gradients of batch_norm_activation without an addend from grad, that of its result: {dx, d_weight, d_bias}.
AMCT_API std::tuple<Tensor, Tensor, Tensor> batch_norm_activation_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, bool training = true);

// BatchNorm along axis 1, an activation function and ulq_fake_quantize in one pass over x (float32).
//
// mean, invstd: statistics; weight, bias: BatchNorm's, or none; all float32, one a channel, contiguous. activation:
// "none", which takes bounds (ReLU: lowest 0), or "hardswish". Clips, num_bits, fixed_min and results are those of
// ulq_fake_quantize. BatchNorm rounds as torch's kernels on processors with FMA. Has no gradient: a rule calls
// batch_norm_ulq_backward.
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_ulq(
    const Tensor& x, const Tensor& mean, const Tensor& invstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max,
    const Tensor& prev_clip_min, int64_t num_bits = 8, bool fixed_min = false);

// Gradients of batch_norm_ulq from grad, that of y, and the clips that the forward returned. training: mean and invstd
// are those of x, so x has a gradient through them, too; else they are constants.
// Returns {dx, d_weight, d_bias, d_clip_max, d_clip_min in the clips' dtype}.
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_ulq_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits = 8,
    bool training = true);

}  // namespace amct_ext
