// Adaptive-range quantisation, shared by the dense and the sparse ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace amct_ext::cpu {

// One weight to quantise by its own range: dense tensors of the same layout. `y` may be `source`: the loops
// write a value when they are done with it.
struct ArqJob {
  at::Tensor source, mask, y, scale;  // `mask` undefined: all is kept
  std::optional<int64_t> channel_axis;
  std::function<Range(int64_t)> prepare = nullptr;  // makes a channel of `source` and takes its range
  at::Tensor origin = {};                           // what it makes it of, laid out as `source`
};

Range joined(Range a, Range b);

// A job on `w` with new results; `w` may be non-dense, `mask` any layout.
ArqJob arq_job(const at::Tensor& w, const at::Tensor& mask, std::optional<int64_t> channel_axis);

// All jobs in one parallel region, except those with a single scale or with channels in short runs.
void run_arq(const std::vector<ArqJob>& jobs, int num_bits);

}  // namespace amct_ext::cpu
