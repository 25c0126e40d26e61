// Adaptive-range quantisation of weights: arq_fake_quantize, arq_fake_quantize_many, and the part that sparse forms
// share.
#include "cpu/weight_arq.h"

#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/quant_math.h"
#include "cpu/gather_rows.h"
#include "cpu/result_pool.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

constexpr int64_t kMostAhead = 1 << 17;  // bytes

int64_t address_of(const Tensor& t) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.const_data_ptr())); }

// Pointers of a job and the loops for its element type.
class Weight {
 public:
  Weight(const ArqJob& job, int num_bits)
      : view(axis_view(job.source, job.channel_axis)),
        prepare_(job.prepare),
        element_(element_of(job.source)),
        size_(job.source.element_size()),
        num_bits_(num_bits),
        in_(job.source.const_data_ptr()),
        mask_(job.mask.defined() ? static_cast<const uint8_t*>(job.mask.const_data_ptr()) : nullptr),
        to_origin_(job.origin.defined() ? address_of(job.origin) - address_of(job.source) : 0),
        out_(job.y.mutable_data_ptr()),
        scale_(job.scale.mutable_data_ptr()) {}

  const AxisView view;

  // Channels from `begin` to `end`. Where each is one run, the loop that quantises one takes the range of the next.
  void channels(int64_t begin, int64_t end) const {
    if (mask_ || prepare_ || view.outer > 1) {
      for (int64_t c = begin; c < end; ++c) channel(c);
      return;
    }
    const auto quantize_and_range = kernels().quantize_and_range[element_];
    const int64_t n = view.inner;
    Range range = range_at(begin * n, n);
    for (int64_t c = begin; c < end; ++c) {
      const Symmetric symmetric = parameters(range);
      put_scale(c, symmetric.scale);
      if (c + 1 == end) {
        quantize_at(c * n, n, symmetric);
      } else {
        range = quantize_and_range(at_element(in_, c * n, size_), at_element(out_, c * n, size_), n, symmetric,
                                   at_element(in_, (c + 1) * n, size_));
      }
    }
  }

  // All channels, where their weights are scattered.
  void gathered() const {
    for_gathered<2>(view, {{{in_, size_}, {mask_, 1}}}, out_, size_,
                    [&](int64_t channel, const std::array<const char*, 2>& in, char* out, int64_t n) {
                      const auto* mask = reinterpret_cast<const uint8_t*>(in[1]);
                      const Symmetric symmetric = parameters(range(in[0], mask, n));
                      quantize(in[0], mask, out, n, symmetric);
                      put_scale(channel, symmetric.scale);
                    });
  }

  // A single scale: the blocks of the tensor share it.
  void whole() const {
    const int64_t n = view.outer * view.inner;
    std::vector<Range> parts((n + kBlock - 1) / kBlock);
    for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) { parts[block] = range_at(begin, end - begin); });
    Range all = parts[0];
    for (const Range& part : parts) all = joined(all, part);
    const Symmetric symmetric = parameters(all);
    for_blocks(n, [&](int64_t, int64_t begin, int64_t end) { quantize_at(begin, end - begin, symmetric); });
    put_scale(0, symmetric.scale);
  }

 private:
  void channel(int64_t channel) const {
    Range whole = prepare_ ? prepare_(channel) : range_at(channel * view.inner, view.inner);
    for (int64_t o = 1; o < view.outer; ++o) whole = joined(whole, range_at(first(o, channel), view.inner));
    Symmetric symmetric = parameters(whole);
    // What is read next is the next channel's, unless that would drive this one out of the cache.
    const int64_t bytes = view.inner * static_cast<int64_t>(size_);
    if (bytes <= kMostAhead) symmetric.ahead = bytes + to_origin_;
    for (int64_t o = 0; o < view.outer; ++o) quantize_at(first(o, channel), view.inner, symmetric);
    put_scale(channel, symmetric.scale);
  }

  int64_t first(int64_t o, int64_t channel) const { return (o * view.size + channel) * view.inner; }

  Range range(const void* in, const uint8_t* mask, int64_t n) const {
    return mask ? kernels().masked_range[element_](in, mask, n) : kernels().range[element_](in, n);
  }
  void quantize(const void* in, const uint8_t* mask, void* out, int64_t n, const Symmetric& symmetric) const {
    if (mask) {
      kernels().masked_quantize[element_](in, mask, out, n, symmetric);
    } else {
      kernels().quantize[element_](in, out, n, symmetric);
    }
  }

  const uint8_t* mask_at(int64_t begin) const { return mask_ ? mask_ + begin : nullptr; }
  Range range_at(int64_t begin, int64_t n) const { return range(at_element(in_, begin, size_), mask_at(begin), n); }
  void quantize_at(int64_t begin, int64_t n, const Symmetric& symmetric) const {
    quantize(at_element(in_, begin, size_), mask_at(begin), at_element(out_, begin, size_), n, symmetric);
  }

  Symmetric parameters(Range range) const {
    const auto codes = math::code_range(num_bits_);
    const double scale = element_ == kFloat64
                             ? math::symmetric_scale(range.largest, range.smallest, num_bits_)
                             : static_cast<double>(math::symmetric_scale(
                                   static_cast<float>(range.largest), static_cast<float>(range.smallest), num_bits_));
    return {scale, codes.lowest, codes.highest};
  }

  void put_scale(int64_t channel, double scale) const {
    if (element_ == kFloat64) {
      static_cast<double*>(scale_)[channel] = scale;
    } else {
      static_cast<float*>(scale_)[channel] = static_cast<float>(scale);
    }
  }

  const std::function<Range(int64_t)>& prepare_;
  Element element_;
  size_t size_;
  int num_bits_;
  const void* in_;
  const uint8_t* mask_;
  int64_t to_origin_;
  void* out_;
  void* scale_;
};

struct Piece {
  const Weight* weight;
  int64_t first, last;  // channels
};

std::tuple<Tensor, Tensor> arq_forward(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis) {
  const char* op = "arq_fake_quantize";
  check_floating(op, "w", w);
  check_bits(op, num_bits);
  if (channel_axis) channel_axis = check_axis(op, "channel_axis", w, *channel_axis);
  ArqJob job = arq_job(w, {}, channel_axis);
  run_arq({job}, static_cast<int>(num_bits));
  return {std::move(job.y), std::move(job.scale)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_many(at::TensorList weights, int64_t num_bits,
                                                              at::IntArrayRef channel_axes) {
  const char* op = "arq_fake_quantize_many";
  check_bits(op, num_bits);
  TORCH_CHECK_VALUE(channel_axes.size() == weights.size(), op,
                    ": channel_axes must hold one axis (-1 for none) for each of ", weights.size(), " weights, not ",
                    channel_axes.size());
  std::vector<ArqJob> jobs;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_floating(op, "a weight", weights[i]);
    std::optional<int64_t> axis;
    if (channel_axes[i] >= 0) axis = check_axis(op, "channel axis", weights[i], channel_axes[i]);
    jobs.push_back(arq_job(weights[i], {}, axis));
  }
  run_arq(jobs, static_cast<int>(num_bits));
  std::vector<Tensor> ys, scales;
  for (ArqJob& job : jobs) {
    ys.push_back(std::move(job.y));
    scales.push_back(std::move(job.scale));
  }
  return {std::move(ys), std::move(scales)};
}

}  // namespace

Range joined(Range a, Range b) {
  const bool nan = a.largest != a.largest || b.largest != b.largest;
  return nan ? Range{NAN, NAN} : Range{std::max(a.largest, b.largest), std::min(a.smallest, b.smallest)};
}

ArqJob arq_job(const Tensor& w, const Tensor& mask, std::optional<int64_t> channel_axis) {
  const Tensor source = dense(w);
  return {source, mask.defined() ? match_mask_layout(mask, source) : Tensor(), reused_like(source, Life::kStep),
          at::empty({channel_axis ? w.size(*channel_axis) : 1}, w.options().dtype(accumulate_type(w))), channel_axis};
}

void run_arq(const std::vector<ArqJob>& jobs, int num_bits) {
  std::vector<Weight> weights;
  weights.reserve(jobs.size());  // pieces point to them
  std::vector<Piece> pieces;
  for (const ArqJob& job : jobs) {
    if (job.source.numel() == 0) {
      job.scale.fill_(1);
      continue;
    }
    const Weight& weight = weights.emplace_back(job, num_bits);
    const int64_t count = weight.view.size, size = weight.view.outer * weight.view.inner;
    if (count == 1) {
      weight.whole();
      continue;
    }
    if (short_runs(weight.view)) {
      weight.gathered();
      continue;
    }
    const int64_t step = std::max<int64_t>(1, kGrain * kBlock / size);
    for (int64_t first = 0; first < count; first += step) {
      pieces.push_back({&weight, first, std::min(count, first + step)});
    }
  }
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const Piece& piece = pieces[i];
      int64_t last = piece.last;
      while (++i < end && pieces[i].weight == piece.weight) last = pieces[i].last;
      piece.weight->channels(piece.first, last);
    }
  });
}

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("arq_fake_quantize", arq_forward);
  m.impl("arq_fake_quantize_many", arq_many);
}

}  // namespace amct_ext::cpu
