// Checks of the ops on 2:4 masks, for every device that has kernels of them. Axes are returned counted from the front.
#pragma once

#include <c10/util/accumulate.h>

#include "common/check.h"

namespace amct_ext {

// A mask of the weight w.
inline void check_mask(const char* op, const at::Tensor& mask, const at::Tensor& w) {
  check_type(op, "mask", mask, at::kBool);
  check_same_shape(op, "mask", mask, "w", w);
  check_device(op, "mask", mask, "w", w);
}

// A weight, its mask and how fast masked weights decay.
inline void check_decaying(const char* op, const at::Tensor& w, const at::Tensor& mask, double decay) {
  check_floating(op, "w", w);
  check_mask(op, mask, w);
  TORCH_CHECK_VALUE(decay >= 0, op, ": decay must be 0 or more, not ", decay);
}

// The same, and the gradient of the masked weight.
inline void check_decaying_backward(const char* op, const at::Tensor& grad, const at::Tensor& w, const at::Tensor& mask,
                                    double decay) {
  check_decaying(op, w, mask, decay);
  check_type(op, "grad", grad, w.scalar_type());
  check_same_shape(op, "grad", grad, "w", w);
  check_device(op, "grad", grad, "w", w);
}

// What refresh_mask_ takes; returns the axis of the mask.
inline int64_t check_refresh(const char* op, const at::Tensor& w, const at::Tensor& mask, const at::Tensor& step,
                             int64_t update_freq, int64_t axis) {
  check_floating(op, "w", w);
  check_mask(op, mask, w);
  check_type(op, "step", step, at::kLong);
  check_scalar(op, "step", step);
  check_device(op, "step", step, "w", w);
  TORCH_CHECK_VALUE(update_freq >= 0, op, ": update_freq must be 0 or more, not ", update_freq);
  return check_axis(op, "axis", w, axis);
}

// The words of a mask of this shape.
inline void check_words(const char* op, const at::Tensor& words, at::IntArrayRef shape) {
  check_type(op, "words", words, at::kLong);
  const int64_t needed = (c10::multiply_integers(shape) + 63) / 64;
  TORCH_CHECK_VALUE(words.dim() == 1 && words.numel() == needed, op, ": a mask of shape ", shape, " takes ", needed,
                    " words in one dimension, not shape ", words.sizes());
}

}  // namespace amct_ext
