// The backward ops of batch_norm_activation and batch_norm_ulq.
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "common/layout.h"
#include "cpu/activation_clips.h"
#include "cpu/batch_norm_channels.h"
#include "cpu/parallel.h"
#include "cpu/result_pool.h"
#include "ops/activation_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

constexpr int64_t kSmallPlane = 1024;

// One backward: its data, and the results of all channels.
struct BatchNormBackward {
  const float *grad, *x;
  float* dx;
  AxisView view;
  Channels channels;
  ActivationParams function;
  std::optional<UlqBackwardParams> quantizer;
  bool training;
  std::vector<BatchNormSums> sums;  // of each channel
  std::vector<UlqSums> clips;       // of each part of the data

  const UlqBackwardParams* quantizer_ptr() const { return quantizer ? &*quantizer : nullptr; }

  // Sets what the gradient of the channel's inputs needs of its sums. In an evaluation mean and variance are constants.
  void finish_channel(int64_t c) {
    if (!training) return;
    const double count = static_cast<double>(view.outer * view.inner), invstd = channels.invstd[c];
    channels.mean_gradient[c] = static_cast<float>(sums[c].gradient / count);
    channels.variance_gradient[c] = static_cast<float>(sums[c].product * invstd * invstd / count);
  }

  // A channel at a time: what the sums have read is still in the cache when dx is computed.
  void run_planes() {
    clips.resize(view.size);
    const bool gather = view.outer > 1 && view.inner < kSmallPlane;
    for_rows(view.size, view.outer * view.inner, [&](int64_t c) {
      if (gather) {
        run_gathered(c);
        return;
      }
      const auto plane = [&](int64_t o) { return (o * view.size + c) * view.inner; };
      for (int64_t o = 0; o < view.outer; ++o) {
        add_sums(c, grad + plane(o), x + plane(o), view.inner);
      }
      finish_channel(c);
      for (int64_t o = view.outer; o-- > 0;) {
        write_dx(c, grad + plane(o), x + plane(o), dx + plane(o), view.inner);
      }
    });
  }

  // Planes of a few vectors cost more at their ends than a copy of all of a channel's planes, one behind the other.
  void run_gathered(int64_t c) {
    const int64_t inner = view.inner, count = view.outer * inner;
    const size_t bytes = static_cast<size_t>(inner) * sizeof(float);
    const auto buffer = std::make_unique_for_overwrite<float[]>(3 * count);
    float *gs = buffer.get(), *xs = gs + count, *results = xs + count;
    for (int64_t o = 0; o < view.outer; ++o) {
      std::memcpy(gs + o * inner, grad + (o * view.size + c) * inner, bytes);
      std::memcpy(xs + o * inner, x + (o * view.size + c) * inner, bytes);
    }
    add_sums(c, gs, xs, count);
    finish_channel(c);
    write_dx(c, gs, xs, results, count);
    for (int64_t o = 0; o < view.outer; ++o) {
      std::memcpy(dx + (o * view.size + c) * inner, results + o * inner, bytes);
    }
  }

  void add_sums(int64_t c, const float* gs, const float* xs, int64_t n) {
    loops().batch_norm_sums_plane(gs, xs, n, channels.channel(c), function, quantizer_ptr(), sums[c], clips[c]);
  }
  void write_dx(int64_t c, const float* gs, const float* xs, float* results, int64_t n) const {
    loops().batch_norm_dx_plane(gs, xs, results, n, channels.channel(c), function, quantizer_ptr());
  }

  void run_rows() {
    const int64_t blocks = row_blocks(view);
    clips.resize(blocks);
    std::vector<double> gradient(blocks * view.size), product(blocks * view.size);
    for_row_blocks(view, [&](int64_t block, int64_t row, int64_t rows) {
      const int64_t at = row * view.size, first = block * view.size;
      loops().batch_norm_sums_rows(grad + at, x + at, rows, view.size, channels.rows(), function, quantizer_ptr(),
                                   gradient.data() + first, product.data() + first, clips[block]);
    });
    for (int64_t i = 0; i < blocks * view.size; ++i) {
      sums[i % view.size].gradient += gradient[i];
      sums[i % view.size].product += product[i];
    }
    for (int64_t c = 0; c < view.size; ++c) finish_channel(c);
    for_row_blocks(view, [&](int64_t, int64_t row, int64_t rows) {
      const int64_t at = row * view.size;
      loops().batch_norm_dx_rows(grad + at, x + at, dx + at, rows, view.size, channels.rows(), function,
                                 quantizer_ptr());
    });
  }
};

// {dx, d_weight, d_bias} and the clips' sums.
std::tuple<Tensor, Tensor, Tensor, std::vector<UlqSums>> run_backward(const Tensor& grad, const Tensor& x,
                                                                      const Tensor& mean, Channels channels,
                                                                      const ActivationParams& function,
                                                                      std::optional<UlqBackwardParams> quantizer,
                                                                      bool training) {
  const Tensor source = dense(x);
  const Tensor upstream = match_layout(grad, source);
  Tensor dx = pooled_like(source, Lifetime::kLayer);
  const AxisView view = axis_view(source, 1);
  BatchNormBackward backward{upstream.const_data_ptr<float>(),
                             source.const_data_ptr<float>(),
                             dx.mutable_data_ptr<float>(),
                             view,
                             std::move(channels),
                             function,
                             quantizer,
                             training,
                             std::vector<BatchNormSums>(view.size),
                             {}};
  if (x.numel()) view.inner == 1 ? backward.run_rows() : backward.run_planes();
  Tensor d_weight = at::empty_like(mean), d_bias = at::empty_like(mean);
  for (int64_t c = 0; c < view.size; ++c) {
    set_value(d_weight, c, backward.sums[c].product * backward.channels.invstd[c]);
    set_value(d_bias, c, backward.sums[c].gradient);
  }
  return {std::move(dx), std::move(d_weight), std::move(d_bias), std::move(backward.clips)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_activation_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
    const OptionalTensor& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, bool training) {
  const char* op = "batch_norm_activation_backward";
  check_batch_norm(op, x, mean, invstd, weight, bias, activation, lowest, highest);
  check_float_like(op, "grad", grad, "x", x);
  auto [dx, d_weight, d_bias, clips] =
      run_backward(grad, x, mean, Channels(mean, invstd, weight, bias), activation_params(activation, lowest, highest),
                   std::nullopt, training);
  return {std::move(dx), std::move(d_weight), std::move(d_bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_ulq_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
    const OptionalTensor& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits, bool training) {
  const char* op = "batch_norm_ulq_backward";
  check_batch_norm(op, x, mean, invstd, weight, bias, activation, lowest, highest);
  check_float_like(op, "grad", grad, "x", x);
  check_ulq_backward(op, grad, x, clip_max, clip_min, num_bits);
  auto [dx, d_weight, d_bias, clips] =
      run_backward(grad, x, mean, Channels(mean, invstd, weight, bias), activation_params(activation, lowest, highest),
                   backward_params<float>(clip_max, clip_min, num_bits), training);
  auto [d_max, d_min] = clip_gradients(clips, clip_max, clip_min, num_bits);
  return {std::move(dx), std::move(d_weight), std::move(d_bias), std::move(d_max), std::move(d_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("batch_norm_activation_backward", batch_norm_activation_backward);
  m.impl("batch_norm_ulq_backward", batch_norm_ulq_backward);
}

}  // namespace amct_ext::cpu
