// Adaptive-range quantisation of weights: arq_fake_quantize, arq_fake_quantize_many, and the part that sparse forms
// share.
#include "cpu/weight_arq.h"

#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "common/quant_math.h"
#include "cpu/gather_rows.h"
#include "cpu/parallel.h"
#include "cpu/result_pool.h"
#include "cpu/tensor_access.h"
#include "ops/weight_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

// A channel is prefetched while the one before is quantised, unless that would evict it from the L2 cache.
constexpr int64_t kMaxPrefetched = 1 << 17;  // bytes

// Some channels of a weight.
struct WorkItem {
  const ArqWeight* weight;
  int64_t first, last;
};

std::tuple<Tensor, Tensor> arq_fake_quantize(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis) {
  channel_axis = check_weight("arq_fake_quantize", w, num_bits, channel_axis);
  ArqJob job = arq_job(w, {}, channel_axis);
  arq_quantize({job}, static_cast<int>(num_bits));
  return {std::move(job.y), std::move(job.scale)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_fake_quantize_many(at::TensorList weights, int64_t num_bits,
                                                                            at::IntArrayRef channel_axes) {
  const auto axes = check_weights("arq_fake_quantize_many", weights, num_bits, channel_axes);
  std::vector<ArqJob> jobs;
  jobs.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) jobs.push_back(arq_job(weights[i], {}, axes[i]));
  arq_quantize(jobs, static_cast<int>(num_bits));
  std::vector<Tensor> ys, scales;
  for (ArqJob& job : jobs) {
    ys.push_back(std::move(job.y));
    scales.push_back(std::move(job.scale));
  }
  return {std::move(ys), std::move(scales)};
}

}  // namespace

Range merge(Range a, Range b) {
  const bool nan = a.max != a.max || b.max != b.max;
  return nan ? Range{NAN, NAN} : Range{std::max(a.max, b.max), std::min(a.min, b.min)};
}

ArqWeight::ArqWeight(const ArqJob& job, int num_bits)
    : view(axis_view(job.source, job.channel_axis)),
      element_(element_of(job.source)),
      size_(job.source.element_size()),
      num_bits_(num_bits),
      in_(job.source.const_data_ptr()),
      mask_(job.mask.defined() ? static_cast<const uint8_t*>(job.mask.const_data_ptr()) : nullptr),
      out_(job.y.mutable_data_ptr()),
      scale_(job.scale.mutable_data_ptr()) {}

void ArqWeight::quantize_channel(int64_t channel, Range range, int64_t prefetch_offset) const {
  SymmetricParams params = params_of(range);
  const int64_t bytes = view.inner * static_cast<int64_t>(size_);
  if (bytes <= kMaxPrefetched) params.prefetch_distance = bytes + prefetch_offset;
  for (int64_t o = 0; o < view.outer; ++o) quantize_at(run_start(o, channel), view.inner, params);
  store_scale(channel, params.scale);
}

void ArqWeight::quantize_channels(int64_t begin, int64_t end) const {
  const int64_t n = view.inner;
  if (mask_ || view.outer > 1) {
    for (int64_t c = begin; c < end; ++c) {
      Range whole = range_at(run_start(0, c), n);
      for (int64_t o = 1; o < view.outer; ++o) whole = merge(whole, range_at(run_start(o, c), n));
      quantize_channel(c, whole);
    }
    return;
  }
  const auto quantize_and_range = loops().quantize_and_range[element_];
  Range range = range_at(begin * n, n);
  for (int64_t c = begin; c < end; ++c) {
    const SymmetricParams params = params_of(range);
    store_scale(c, params.scale);
    if (c + 1 == end) {
      quantize_at(c * n, n, params);
    } else {
      range = quantize_and_range(element_ptr(in_, c * n, size_), element_ptr(out_, c * n, size_), n, params,
                                 element_ptr(in_, (c + 1) * n, size_));
    }
  }
}

void ArqWeight::quantize_gathered() const {
  for_gathered_rows<2>(view, {{{in_, size_}, {mask_, 1}}}, out_, size_,
                       [&](int64_t channel, const std::array<const char*, 2>& in, char* out, int64_t n) {
                         const auto* mask = reinterpret_cast<const uint8_t*>(in[1]);
                         const SymmetricParams params = params_of(range(in[0], mask, n));
                         quantize(in[0], mask, out, n, params);
                         store_scale(channel, params.scale);
                       });
}

void ArqWeight::quantize_per_tensor() const {
  const int64_t n = view.outer * view.inner;
  std::vector<Range> parts(block_count(n));
  for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) { parts[block] = range_at(begin, end - begin); });
  Range all = parts[0];
  for (const Range& part : parts) all = merge(all, part);
  const SymmetricParams params = params_of(all);
  for_blocks(n, [&](int64_t, int64_t begin, int64_t end) { quantize_at(begin, end - begin, params); });
  store_scale(0, params.scale);
}

Range ArqWeight::range(const void* in, const uint8_t* mask, int64_t n) const {
  return mask ? loops().masked_range[element_](in, mask, n) : loops().range[element_](in, n);
}

Range ArqWeight::range_at(int64_t begin, int64_t n) const {
  return range(element_ptr(in_, begin, size_), mask_at(begin), n);
}

void ArqWeight::quantize(const void* in, const uint8_t* mask, void* out, int64_t n,
                         const SymmetricParams& params) const {
  if (mask) {
    loops().masked_quantize[element_](in, mask, out, n, params);
  } else {
    loops().quantize[element_](in, out, n, params);
  }
}

void ArqWeight::quantize_at(int64_t begin, int64_t n, const SymmetricParams& params) const {
  quantize(element_ptr(in_, begin, size_), mask_at(begin), element_ptr(out_, begin, size_), n, params);
}

SymmetricParams ArqWeight::params_of(Range range) const {
  const auto codes = math::code_range(num_bits_);
  const double scale = element_ == kFloat64
                           ? math::symmetric_scale(range.max, range.min, num_bits_)
                           : static_cast<double>(math::symmetric_scale(static_cast<float>(range.max),
                                                                       static_cast<float>(range.min), num_bits_));
  return {scale, codes.lowest, codes.highest};
}

void ArqWeight::store_scale(int64_t channel, double scale) const {
  if (element_ == kFloat64) {
    static_cast<double*>(scale_)[channel] = scale;
  } else {
    static_cast<float*>(scale_)[channel] = static_cast<float>(scale);
  }
}

ArqJob arq_job(const Tensor& w, const Tensor& mask, std::optional<int64_t> channel_axis) {
  const Tensor source = dense(w);
  return {source, mask.defined() ? match_mask_layout(mask, source) : Tensor(), pooled_like(source, Lifetime::kStep),
          at::empty({channel_axis ? w.size(*channel_axis) : 1}, w.options().dtype(accumulate_type(w))), channel_axis};
}

void arq_quantize(const std::vector<ArqJob>& jobs, int num_bits) {
  std::vector<ArqWeight> weights;
  weights.reserve(jobs.size());  // work items point to them
  std::vector<WorkItem> work;
  for (const ArqJob& job : jobs) {
    if (job.source.numel() == 0) {
      job.scale.fill_(1);
      continue;
    }
    const ArqWeight& weight = weights.emplace_back(job, num_bits);
    const int64_t count = weight.view.size, size = weight.view.outer * weight.view.inner;
    if (count == 1) {
      weight.quantize_per_tensor();
      continue;
    }
    if (has_short_runs(weight.view)) {
      weight.quantize_gathered();
      continue;
    }
    const int64_t step = row_grain(size);
    for (int64_t first = 0; first < count; first += step) {
      work.push_back({&weight, first, std::min(count, first + step)});
    }
  }
  at::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const WorkItem& item = work[i];
      int64_t last = item.last;
      for (++i; i < end && work[i].weight == item.weight; ++i) last = work[i].last;
      item.weight->quantize_channels(item.first, last);
    }
  });
}

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("arq_fake_quantize", arq_fake_quantize);
  m.impl("arq_fake_quantize_many", arq_fake_quantize_many);
}

}  // namespace amct_ext::cpu
