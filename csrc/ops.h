// amct_ext for C++: quantisation-aware training and 2:4 sparsity as operators of PyTorch, without Python.
//
// Every function below is a typed call of the op of the same name (torch.ops.amct_ext.<name>) through torch's
// dispatcher: it runs on the device of its arguments, records gradients and raises the same errors as from Python.
// Kernels exist for the CPU, and for CUDA where libamct_ext_cuda is loaded. A device without kernels needs the Python
// package, whose plain-torch references then serve it. Algorithms and their sources are described in docs/ops.md and in
// amct_ext/ops.
//
//   #include <amct_ext/ops.h>
//
//   const at::Tensor none = at::full({}, NAN);  // no previous clips yet
//   const auto [y, scale, offset, used_max, used_min, invalid] =
//       amct_ext::ulq_fake_quantize(x, clip_max, clip_min, none, none);   // gradients of x, clip_max and clip_min
//   const auto [w_y, w_scale] = amct_ext::arq_fake_quantize(w, 8, 0);     // 8 bits, one scale per output channel
//   const at::Tensor z = at::conv2d(y, w_y);
//
// With CMake: find_package(Torch), find_package(amct_ext), then link amct_ext::amct_ext and ${TORCH_LIBRARIES}. A whole
// program that trains a step is tests/native/consumer.
//
// Said once for all functions:
// * "floating" means float32, float64, float16 or bfloat16. Arithmetic is float32, for float64 data float64.
// * A scalar tensor holds one value, of any shape; scalar results are 0-dim. Nothing is read on the host: what would
// need
//   a read is a flag among the results.
// * num_bits is 2 to 16, where codes are stored as bytes 2 to 8.
// * channel_axis is the output-channel axis of a weight (0 for convolutions and Linear, 1 for transposed convolutions),
//   std::nullopt for one scale. Axes may be negative.
// * Results keep the memory layout of the input and never share its memory. A trailing underscore in a name: arguments
//   are written to, as the function says.
// * Errors are c10::TypeError (dtype), c10::ValueError (value or shape) and c10::IndexError (axis).
#pragma once

#include "ops/activation.h"
#include "ops/calibration.h"
#include "ops/integer.h"
#include "ops/sparsity.h"
#include "ops/weight.h"
