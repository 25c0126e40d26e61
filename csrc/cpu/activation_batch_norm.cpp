// batch_norm_statistics_, batch_norm_ulq and its backward.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "common/layout.h"
#include "common/quant_math.h"
#include "cpu/activation_clips.h"
#include "cpu/parallel.h"
#include "cpu/result_pool.h"
#include "ops/activation_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kSmallPlane = 1024;
constexpr int64_t kPadding = 64;  // floats behind the coefficients of the last channel; a strip may read them

ActivationParams activation_params(c10::string_view activation, std::optional<double> lowest,
                                   std::optional<double> highest) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return {activation == "hardswish" ? ActivationFunction::kHardswish : ActivationFunction::kClamp,
          lowest ? static_cast<float>(*lowest) : -infinity, highest ? static_cast<float>(*highest) : infinity};
}

// The coefficients of all channels. The rounding is that of torch: one multiply-add for the shift.
struct Channels {
  std::vector<float> factor, shift, mean, mean_gradient, slope, invstd;

  Channels(const Tensor& means, const Tensor& invstds, const OptionalTensor& weight, const OptionalTensor& bias) {
    const int64_t count = means.numel();
    for (std::vector<float>* values : {&factor, &shift, &mean, &mean_gradient, &slope, &invstd}) {
      values->resize(count + kPadding);
    }
    for (int64_t c = 0; c < count; ++c) {
      mean[c] = static_cast<float>(value_at(means, c));
      invstd[c] = static_cast<float>(value_at(invstds, c));
      factor[c] = weight ? invstd[c] * static_cast<float>(value_at(*weight, c)) : invstd[c];
      shift[c] = std::fma(-mean[c], factor[c], bias ? static_cast<float>(value_at(*bias, c)) : 0.0f);
    }
  }

  BatchNormChannel channel(int64_t c) const { return {factor[c], shift[c], mean[c], mean_gradient[c], slope[c]}; }
  BatchNormRows rows() const {
    return {factor.data(), shift.data(), mean.data(), mean_gradient.data(), slope.data()};
  }
};

int64_t rows_per_block(const AxisView& view) { return std::max<int64_t>(1, kBlock / std::max<int64_t>(1, view.size)); }
int64_t row_blocks(const AxisView& view) { return (view.outer + rows_per_block(view) - 1) / rows_per_block(view); }

// f(block, first row, number of rows), where channels are neighbours in memory.
template <typename F>
void for_row_blocks(const AxisView& view, const F& f) {
  const int64_t together = rows_per_block(view);
  at::parallel_for(0, row_blocks(view), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      f(block, block * together, std::min(together, view.outer - block * together));
    }
  });
}

// As torch rounds: sums in float64, results and the squared distances in float32.
std::tuple<Tensor, Tensor> batch_norm_statistics_(const Tensor& x, const OptionalTensor& running_mean,
                                                  const OptionalTensor& running_var, double momentum, double eps) {
  check_batch_norm_statistics("batch_norm_statistics_", x, running_mean, running_var);
  const Tensor source = x.contiguous();
  const int64_t size = x.size(1), inner = x.numel() / std::max<int64_t>(1, x.size(0) * size);
  const AxisView view{x.size(0), size, inner};
  const int64_t count = view.outer * view.inner;
  const float share = static_cast<float>(momentum);
  Tensor means = at::empty({size}, x.options()), invstds = at::empty({size}, x.options());
  const float* in = source.const_data_ptr<float>();
  for_rows(size, count, [&](int64_t c) {
    const auto over_planes = [&](const auto& sum) {
      double total = 0;
      for (int64_t o = 0; o < view.outer; ++o) total += sum(in + (o * size + c) * view.inner);
      return total;
    };
    const float mean = static_cast<float>(
        over_planes([&](const float* plane) { return loops().sum_values(plane, view.inner); }) / count);
    const float squares = static_cast<float>(
        over_planes([&](const float* plane) { return loops().sum_squared_distances(plane, view.inner, mean); }));
    set_value(means, c, mean);
    set_value(invstds, c, 1 / std::sqrt(static_cast<double>(squares / static_cast<float>(count)) + eps));
    const auto kept = [&](const Tensor& running) { return (1 - share) * static_cast<float>(value_at(running, c)); };
    if (running_mean) set_value(*running_mean, c, share * mean + kept(*running_mean));
    if (running_var) {
      const double unbiased = squares / static_cast<float>(count - 1);
      set_value(*running_var, c, static_cast<double>(share) * unbiased + kept(*running_var));
    }
  });
  return {std::move(means), std::move(invstds)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_ulq(
    const Tensor& x, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
    c10::string_view activation, std::optional<double> lowest, std::optional<double> highest, const Tensor& clip_max,
    const Tensor& clip_min, const Tensor& prev_clip_max, const Tensor& prev_clip_min, int64_t num_bits,
    bool fixed_min) {
  const char* op = "batch_norm_ulq";
  check_batch_norm(op, x, mean, invstd, weight, bias, activation, lowest, highest);
  check_bits(op, num_bits);
  const Clips clips = resolve_clips(op, x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
  const UlqForwardParams quantizer = clips.params(num_bits);
  const ActivationParams function = activation_params(activation, lowest, highest);
  const Channels channels(mean, invstd, weight, bias);

  const Tensor source = dense(x);
  Tensor y = pooled_like(source, Lifetime::kLayer);
  const AxisView view = axis_view(source, 1);
  const float* in = source.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  std::atomic<bool> bad{!clips.valid()};
  const auto note = [&](bool found) {
    if (found) bad.store(true, std::memory_order_relaxed);
  };
  if (view.inner == 1) {
    for_row_blocks(view, [&](int64_t, int64_t row, int64_t rows) {
      const int64_t at = row * view.size;
      note(loops().batch_norm_ulq_rows(in + at, out + at, rows, view.size, channels.factor.data(),
                                       channels.shift.data(), function, quantizer));
    });
  } else {
    const int64_t parts = std::max<int64_t>(1, block_count(view.inner));
    const int64_t planes = view.inner == 0 ? 0 : view.outer * view.size;
    at::parallel_for(0, planes * parts, row_grain(std::min(view.inner, kBlock)), [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t plane = part / parts, skip = part % parts * kBlock, c = plane % view.size;
        const int64_t at = plane * view.inner + skip;
        note(loops().batch_norm_ulq_plane(in + at, out + at, std::min(kBlock, view.inner - skip), channels.factor[c],
                                          channels.shift[c], function, quantizer));
      }
    });
  }
  return ulq_outputs(std::move(y), clips, clip_max, bad.load());
}

UlqBackwardParams quantizer_gradient(const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits) {
  const float high = static_cast<float>(value_at(clip_max, 0)), low = static_cast<float>(value_at(clip_min, 0));
  const auto affine = math::affine(high, low, static_cast<int>(num_bits));
  const math::CodeRange range = math::code_range(static_cast<int>(num_bits));
  return {affine.scale, high, low, affine.scale * (static_cast<float>(range.highest) - affine.offset),
          affine.scale * (static_cast<float>(range.lowest) - affine.offset)};
}

// One backward: its data, and the results of all channels.
struct Backward {
  const float *grad, *x;
  float* dx;
  AxisView view;
  Channels channels;
  ActivationParams function;
  UlqBackwardParams quantizer;
  bool training;
  std::vector<BatchNormSums> sums;  // of a channel
  UlqSums clips;

  // Sets what the gradient of the channel's inputs needs of its sums. In an evaluation mean and variance are constants.
  void finish_channel(int64_t c) {
    if (!training) return;
    const double count = static_cast<double>(view.outer * view.inner), invstd = channels.invstd[c];
    channels.mean_gradient[c] = static_cast<float>(sums[c].gradient / count);
    channels.slope[c] = static_cast<float>(sums[c].product * invstd * invstd / count);
  }

  void add_clips(const std::vector<UlqSums>& parts) {
    for (const UlqSums& part : parts) {
      clips.rounding_error += part.rounding_error;
      clips.above += part.above;
      clips.below += part.below;
    }
  }

  // A channel at a time: what the sums have read is still in the cache when dx is computed.
  void run_planes() {
    std::vector<UlqSums> parts(view.size);
    const bool gather = view.outer > 1 && view.inner < kSmallPlane;
    for_rows(view.size, view.outer * view.inner, [&](int64_t c) {
      if (gather) {
        run_gathered(c, parts[c]);
        return;
      }
      const auto plane = [&](int64_t o) { return (o * view.size + c) * view.inner; };
      for (int64_t o = 0; o < view.outer; ++o) {
        add_sums(c, grad + plane(o), x + plane(o), view.inner, parts[c]);
      }
      finish_channel(c);
      for (int64_t o = view.outer; o-- > 0;) {
        write_dx(c, grad + plane(o), x + plane(o), dx + plane(o), view.inner);
      }
    });
    add_clips(parts);
  }

  // Planes of a few vectors cost more at their ends than a copy of all of a channel's planes, one behind the other.
  void run_gathered(int64_t c, UlqSums& part) {
    const int64_t inner = view.inner, count = view.outer * inner;
    const size_t bytes = static_cast<size_t>(inner) * sizeof(float);
    std::vector<float> buffer(3 * count);
    float *gs = buffer.data(), *xs = gs + count, *results = xs + count;
    for (int64_t o = 0; o < view.outer; ++o) {
      std::memcpy(gs + o * inner, grad + (o * view.size + c) * inner, bytes);
      std::memcpy(xs + o * inner, x + (o * view.size + c) * inner, bytes);
    }
    add_sums(c, gs, xs, count, part);
    finish_channel(c);
    write_dx(c, gs, xs, results, count);
    for (int64_t o = 0; o < view.outer; ++o) {
      std::memcpy(dx + (o * view.size + c) * inner, results + o * inner, bytes);
    }
  }

  void add_sums(int64_t c, const float* gs, const float* xs, int64_t n, UlqSums& part) {
    loops().batch_norm_ulq_sums_plane(gs, xs, n, channels.channel(c), function, quantizer, sums[c], part);
  }
  void write_dx(int64_t c, const float* gs, const float* xs, float* results, int64_t n) const {
    loops().batch_norm_ulq_dx_plane(gs, xs, results, n, channels.channel(c), function, quantizer);
  }

  void run_rows() {
    const int64_t blocks = row_blocks(view);
    std::vector<UlqSums> parts(blocks);
    std::vector<double> gradient(blocks * view.size), product(blocks * view.size);
    for_row_blocks(view, [&](int64_t block, int64_t row, int64_t rows) {
      const int64_t at = row * view.size, first = block * view.size;
      loops().batch_norm_ulq_sums_rows(grad + at, x + at, rows, view.size, channels.rows(), function, quantizer,
                                       gradient.data() + first, product.data() + first, parts[block]);
    });
    for (int64_t i = 0; i < blocks * view.size; ++i) {
      sums[i % view.size].gradient += gradient[i];
      sums[i % view.size].product += product[i];
    }
    for (int64_t c = 0; c < view.size; ++c) finish_channel(c);
    for_row_blocks(view, [&](int64_t, int64_t row, int64_t rows) {
      const int64_t at = row * view.size;
      loops().batch_norm_ulq_dx_rows(grad + at, x + at, dx + at, rows, view.size, channels.rows(), function, quantizer);
    });
    add_clips(parts);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_ulq_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
    const OptionalTensor& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits, bool training) {
  const char* op = "batch_norm_ulq_backward";
  check_batch_norm(op, x, mean, invstd, weight, bias, activation, lowest, highest);
  check_type(op, "grad", grad, at::kFloat);
  check_ulq_backward(op, grad, x, clip_max, clip_min, num_bits);
  const Tensor source = dense(x);
  const Tensor upstream = match_layout(grad, source);
  Tensor dx = pooled_like(source, Lifetime::kLayer);
  const AxisView view = axis_view(source, 1);
  Backward backward{upstream.const_data_ptr<float>(),
                    source.const_data_ptr<float>(),
                    dx.mutable_data_ptr<float>(),
                    view,
                    Channels(mean, invstd, weight, bias),
                    activation_params(activation, lowest, highest),
                    quantizer_gradient(clip_max, clip_min, num_bits),
                    training,
                    std::vector<BatchNormSums>(view.size),
                    {}};
  if (x.numel()) view.inner == 1 ? backward.run_rows() : backward.run_planes();

  Tensor d_weight = at::empty_like(mean), d_bias = at::empty_like(mean);
  for (int64_t c = 0; c < view.size; ++c) {
    set_value(d_weight, c, backward.sums[c].product * backward.channels.invstd[c]);
    set_value(d_bias, c, backward.sums[c].gradient);
  }
  const double error = backward.clips.rounding_error / static_cast<double>((1LL << num_bits) - 1);
  return {std::move(dx), std::move(d_weight), std::move(d_bias), scalar_like(clip_max, error + backward.clips.above),
          scalar_like(clip_min, backward.clips.below - error)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("batch_norm_statistics_", batch_norm_statistics_);
  m.impl("batch_norm_ulq", batch_norm_ulq);
  m.impl("batch_norm_ulq_backward", batch_norm_ulq_backward);
}

}  // namespace amct_ext::cpu
