// batch_norm_statistics_, batch_norm_activation and batch_norm_ulq.
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <tuple>

#include "common/layout.h"
#include "cpu/activation_clips.h"
#include "cpu/batch_norm_channels.h"
#include "cpu/parallel.h"
#include "cpu/result_pool.h"
#include "ops/activation_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

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
    const float mean =
        static_cast<float>(over_planes([&](const float* plane) { return loops().sum_values(plane, view.inner); }) /
                           static_cast<double>(count));
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
    for_plane_pieces(view, [&](int64_t c, int64_t at, int64_t n) {
      note(loops().batch_norm_ulq_plane(in + at, out + at, n, channels.factor[c], channels.shift[c], function,
                                        quantizer));
    });
  }
  return ulq_outputs(std::move(y), clips, clip_max, bad.load());
}

Tensor batch_norm_activation(const Tensor& x, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                             const OptionalTensor& bias, c10::string_view activation, std::optional<double> lowest,
                             std::optional<double> highest, const OptionalTensor& addend) {
  const char* op = "batch_norm_activation";
  check_batch_norm(op, x, mean, invstd, weight, bias, activation, lowest, highest);
  if (addend) check_float_like(op, "addend", *addend, "x", x);
  const ActivationParams function = activation_params(activation, lowest, highest);
  const Channels channels(mean, invstd, weight, bias);
  const Tensor source = dense(x);
  const Tensor more = addend ? match_layout(*addend, source) : Tensor();
  Tensor y = pooled_like(source, Lifetime::kLayer);
  const AxisView view = axis_view(source, 1);
  const float *in = source.const_data_ptr<float>(), *added = addend ? more.const_data_ptr<float>() : nullptr;
  float* out = y.mutable_data_ptr<float>();
  const auto added_at = [&](int64_t at) { return added ? added + at : nullptr; };
  if (view.inner == 1) {
    for_row_blocks(view, [&](int64_t, int64_t row, int64_t rows) {
      const int64_t at = row * view.size;
      loops().batch_norm_rows(in + at, added_at(at), out + at, rows, view.size, channels.factor.data(),
                              channels.shift.data(), function);
    });
  } else {
    for_plane_pieces(view, [&](int64_t c, int64_t at, int64_t n) {
      loops().batch_norm_plane(in + at, added_at(at), out + at, n, channels.factor[c], channels.shift[c], function);
    });
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("batch_norm_statistics_", batch_norm_statistics_);
  m.impl("batch_norm_activation", batch_norm_activation);
  m.impl("batch_norm_ulq", batch_norm_ulq);
}

}  // namespace amct_ext::cpu
