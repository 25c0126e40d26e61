// Adaptive-range quantisation, shared by the dense and the sparse ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "common/layout.h"
#include "cpu/loop_table.h"

namespace amct_ext::cpu {

// One weight to quantise by its own range: dense tensors of the same layout. `y` may be `source`: loops write a value
// when they are done with it.
struct ArqJob {
  at::Tensor source, mask, y, scale;  // `mask` undefined: all is kept
  std::optional<int64_t> channel_axis;
};

// A job on `w` with new results; `w` may be non-dense, `mask` of any layout.
ArqJob arq_job(const at::Tensor& w, const at::Tensor& mask, std::optional<int64_t> channel_axis);

// The range of both; NaN if one is.
Range merge(Range a, Range b);

// The pointers of a job, and the loops for its element type.
class ArqWeight {
 public:
  ArqWeight(const ArqJob& job, int num_bits);

  const AxisView view;

  // Quantises a channel by the given range. The next channel is prefetched; `prefetch_offset` says how many bytes
  // beyond `source` the memory lies that is read for it.
  void quantize_channel(int64_t channel, Range range, int64_t prefetch_offset = 0) const;
  // Channels [begin, end). Where each is one run, quantising a channel also computes the range of the next one, so that
  // each weight is loaded from memory once.
  void quantize_channels(int64_t begin, int64_t end) const;
  // All channels, where they lie in short runs: gathered first.
  void quantize_gathered() const;
  // One scale for the whole tensor.
  void quantize_per_tensor() const;

 private:
  int64_t run_start(int64_t outer, int64_t channel) const { return (outer * view.size + channel) * view.inner; }
  const uint8_t* mask_at(int64_t begin) const { return mask_ ? mask_ + begin : nullptr; }
  Range range(const void* in, const uint8_t* mask, int64_t n) const;
  Range range_at(int64_t begin, int64_t n) const;
  void quantize(const void* in, const uint8_t* mask, void* out, int64_t n, const SymmetricParams& params) const;
  void quantize_at(int64_t begin, int64_t n, const SymmetricParams& params) const;
  SymmetricParams params_of(Range range) const;
  void store_scale(int64_t channel, double scale) const;

  Element element_;
  size_t size_;
  int num_bits_;
  const void* in_;
  const uint8_t* mask_;
  void* out_;
  void* scale_;
};

// All jobs in one parallel region, except those with a single scale or with channels in short runs.
void arq_quantize(const std::vector<ArqJob>& jobs, int num_bits);

}  // namespace amct_ext::cpu
