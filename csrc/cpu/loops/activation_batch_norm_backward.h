// The gradients of BatchNorm, an activation function and ULQ fake quantisation. float32; layouts as in
// activation_batch_norm.h.
#pragma once

#include "cpu/loop_params.h"
#include "cpu/loops/activation_batch_norm.h"
#include "simd/fixed_order_sum.h"

namespace amct_ext::cpu {
namespace {

// The gradient of a vector of BatchNorm's outputs.
template <typename Activation>
struct OutputGradient {
  static constexpr bool kQuantized = false;
  const Activation& activation;

  AMCT_INLINE FloatVec operator()(FloatVec z, FloatVec g) const { return activation.gradient(z, g); }
};

// The same through the quantiser, and the terms of the three sums of the clips.
template <typename Activation>
struct QuantizedOutputGradient {
  static constexpr bool kQuantized = true;
  const Activation& activation;
  FloatVec scale, clip_max, clip_min, upper, lower;

  AMCT_INLINE QuantizedOutputGradient(const Activation& function, const UlqBackwardParams& p)
      : activation(function),
        scale(broadcast(static_cast<float>(p.scale))),
        clip_max(broadcast(static_cast<float>(p.clip_max))),
        clip_min(broadcast(static_cast<float>(p.clip_min))),
        upper(broadcast(static_cast<float>(p.upper))),
        lower(broadcast(static_cast<float>(p.lower))) {}

  AMCT_INLINE FloatVec operator()(FloatVec z, FloatVec g) const {
    const FloatVec a = activation.value(z);
    return activation.gradient(z, zero_unless(~((a > upper) | (a < lower)), g));
  }

  struct Terms {
    FloatVec gradient, error, above, below;
  };
  AMCT_INLINE Terms terms(FloatVec z, FloatVec g) const {
    const FloatVec a = activation.value(z);
    const Mask<float> over = a > upper, under = a < lower;
    const FloatVec t = (over ? clip_max : under ? clip_min : a) / scale;
    return {activation.gradient(z, zero_unless(~(over | under), g)), (round_even(t) - t) * g, zero_unless(over, g),
            zero_unless(under, g)};
  }
};

// `quantizer` may be null.
template <typename Run>
AMCT_INLINE void with_output_gradient(const ActivationParams& a, const UlqBackwardParams* quantizer, const Run& run) {
  with_activation(a, [&](const auto& activation) __attribute__((always_inline)) {
    using Activation = std::decay_t<decltype(activation)>;
    if (quantizer) {
      run(QuantizedOutputGradient<Activation>(activation, *quantizer));
    } else {
      run(OutputGradient<Activation>{activation});
    }
    return 0;
  });
}

// Sums over a strip of kWidth neighbouring values, which moves through the data. Partial sums in float take kSteps
// values before they are added to float64, which bounds their error.
struct LaneSums {
  static constexpr int kWidth = CascadeSum<float>::kWidth, kSteps = CascadeSum<float>::kSteps;
  static_assert(kWidth <= kStripPadding);
  alignas(64) float partial[kWidth] = {};
  Vec<double> lanes[kWidth / kLanes<double>] = {};

  AMCT_INLINE void add(int lane, FloatVec v) { store(partial + lane, load<FloatVec>(partial + lane) + v); }
  AMCT_INLINE void flush() {
    for (int i = 0; i < kWidth / kLanes<double>; ++i) lanes[i] += load_double(partial + i * kLanes<double>);
    for (int i = 0; i < kWidth; i += kFloats) store(partial + i, FloatVec{});
  }
  AMCT_INLINE double lane(int64_t i) const { return lanes[i / kLanes<double>][i % kLanes<double>]; }
};

struct StripSums {
  static constexpr int kWidth = LaneSums::kWidth, kSteps = LaneSums::kSteps;
  LaneSums gradient, product;  // one channel a lane, or all of the same channel
  CascadeSum<float> error, above, below;

  template <typename Output, typename Coefficient>
  AMCT_INLINE void add(const Output& output, const float* grad, const float* x, int64_t c, const Coefficient& factor,
                       const Coefficient& shift, const Coefficient& mean) {
    for (int k = 0; k < kWidth; k += kFloats) {
      const FloatVec v = load<FloatVec>(x + k), z = fma(v, factor[c + k], shift[c + k]), g = load<FloatVec>(grad + k);
      FloatVec dz;
      if constexpr (Output::kQuantized) {
        const auto terms = output.terms(z, g);
        dz = terms.gradient;
        error.add(k, terms.error);
        above.add(k, terms.above);
        below.add(k, terms.below);
      } else {
        dz = output(z, g);
      }
      gradient.add(k, dz);
      product.add(k, dz * (v - mean[c + k]));
    }
  }
  template <typename Output>
  AMCT_INLINE void flush(const Output&) {
    gradient.flush();
    product.flush();
    if constexpr (Output::kQuantized) {
      error.flush();
      above.flush();
      below.flush();
    }
  }
  AMCT_INLINE void add_to(UlqSums& sums) const {
    sums.rounding_error += error.sums.total();
    sums.above += above.sums.total();
    sums.below += below.sums.total();
  }
};

// Copies of less than a strip, zeros behind them: without a gradient a value adds nothing.
struct StripCopy {
  float values[StripSums::kWidth] = {};
  AMCT_INLINE StripCopy(const float* from, int64_t count) {
    __builtin_memcpy(values, from, static_cast<size_t>(count) * sizeof(float));
  }
};

void batch_norm_sums_plane(const float* grad, const float* x, int64_t n, const BatchNormChannel& channel,
                           const ActivationParams& a, const UlqBackwardParams* p, BatchNormSums& out, UlqSums& clips) {
  constexpr int kWidth = StripSums::kWidth;
  with_output_gradient(a, p, [&](const auto& output) __attribute__((always_inline)) {
    const PlaneCoefficient factor(channel.factor), shift(channel.shift), mean(channel.mean);
    StripSums sums;
    int64_t i = 0;
    for (int step = 0; i + kWidth <= n; i += kWidth) {
      prefetch<kWidth * sizeof(float)>(grad + i, kPrefetchDistance);
      prefetch<kWidth * sizeof(float)>(x + i, kPrefetchDistance);
      sums.add(output, grad + i, x + i, 0, factor, shift, mean);
      if (++step % StripSums::kSteps == 0) sums.flush(output);
    }
    if (i < n)
      sums.add(output, StripCopy(grad + i, n - i).values, StripCopy(x + i, n - i).values, 0, factor, shift, mean);
    sums.flush(output);
    sums.add_to(clips);
    for (int lane = 0; lane < kWidth; ++lane) {
      out.gradient += sums.gradient.lane(lane);
      out.product += sums.product.lane(lane);
    }
  });
}

void batch_norm_sums_rows(const float* grad, const float* x, int64_t rows, int64_t channels, const BatchNormRows& row,
                          const ActivationParams& a, const UlqBackwardParams* p, double* gradient, double* product,
                          UlqSums& clips) {
  constexpr int kWidth = StripSums::kWidth;
  with_output_gradient(a, p, [&](const auto& output) __attribute__((always_inline)) {
    const RowCoefficient factor(row.factor), shift(row.shift), mean(row.mean);
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t width = channels - c < kWidth ? channels - c : kWidth;
      StripSums sums;
      for (int64_t r = 0; r < rows; ++r) {
        const float *gs = grad + r * channels + c, *xs = x + r * channels + c;
        if (width == kWidth) {
          sums.add(output, gs, xs, c, factor, shift, mean);
        } else {
          sums.add(output, StripCopy(gs, width).values, StripCopy(xs, width).values, c, factor, shift, mean);
        }
        if ((r + 1) % StripSums::kSteps == 0) sums.flush(output);
      }
      sums.flush(output);
      sums.add_to(clips);
      for (int64_t lane = 0; lane < width; ++lane) {
        gradient[c + lane] += sums.gradient.lane(lane);
        product[c + lane] += sums.product.lane(lane);
      }
    }
  });
}

// BatchNorm's gradient at whole vectors, from that at its output and what the sums over a channel gave.
template <typename Output, typename Coefficient>
struct InputGradient {
  const Output& output;
  Coefficient factor, shift, mean, mean_gradient, variance_gradient;

  template <typename Channels>
  AMCT_INLINE InputGradient(const Output& function, const Channels& p)
      : output(function),
        factor(p.factor),
        shift(p.shift),
        mean(p.mean),
        mean_gradient(p.mean_gradient),
        variance_gradient(p.variance_gradient) {}

  AMCT_INLINE void operator()(const float* grad, const float* x, float* dx, int64_t c) const {
    const FloatVec v = load<FloatVec>(x);
    const FloatVec dz = output(fma(v, factor[c], shift[c]), load<FloatVec>(grad));
    store(dx, (dz - mean_gradient[c] - (v - mean[c]) * variance_gradient[c]) * factor[c]);
  }
  // Less than a vector.
  AMCT_INLINE void operator()(const float* grad, const float* x, float* dx, int64_t c, int64_t count) const {
    float out[kFloats];
    (*this)(StripCopy(grad, count).values, StripCopy(x, count).values, out, c);
    __builtin_memcpy(dx, out, static_cast<size_t>(count) * sizeof(float));
  }
};

void batch_norm_dx_plane(const float* grad, const float* x, float* dx, int64_t n, const BatchNormChannel& channel,
                         const ActivationParams& a, const UlqBackwardParams* p) {
  with_output_gradient(a, p, [&](const auto& output) __attribute__((always_inline)) {
    const InputGradient<std::decay_t<decltype(output)>, PlaneCoefficient> gradient(output, channel);
    int64_t i = 0;
    for (; i + kFloats <= n; i += kFloats) {
      prefetch<kVecBytes>(dx + i, kPrefetchDistance);
      gradient(grad + i, x + i, dx + i, 0);
    }
    if (i < n) gradient(grad + i, x + i, dx + i, 0, n - i);
  });
}

void batch_norm_dx_rows(const float* grad, const float* x, float* dx, int64_t rows, int64_t channels,
                        const BatchNormRows& row, const ActivationParams& a, const UlqBackwardParams* p) {
  with_output_gradient(a, p, [&](const auto& output) __attribute__((always_inline)) {
    const InputGradient<std::decay_t<decltype(output)>, RowCoefficient> gradient(output, row);
    for (int64_t r = 0; r < rows; ++r, grad += channels, x += channels, dx += channels) {
      int64_t c = 0;
      for (; c + kFloats <= channels; c += kFloats) gradient(grad + c, x + c, dx + c, c);
      if (c < channels) gradient(grad + c, x + c, dx + c, c, channels - c);
    }
  });
}

}  // namespace
}  // namespace amct_ext::cpu
