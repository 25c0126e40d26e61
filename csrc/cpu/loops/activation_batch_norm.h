// BatchNorm, an activation function and ULQ fake quantisation (or an addition) in one pass, and their gradients.
// float32.
//
// Channels come in two layouts. Plane: a run of values of one channel, so its coefficients are broadcast. Rows: one
// value of each channel after the other (channels last), so coefficients are read along with the values.
#pragma once

#include "cpu/loop_params.h"
#include "cpu/loops/activation_ulq.h"

namespace amct_ext::cpu {
namespace {

using FloatVec = Vec<float>;
constexpr int kFloats = kLanes<float>;

// Activation functions: the value at z, and a gradient times the slope at z. Comparisons let NaN pass.
struct ClampActivation {
  FloatVec lowest, highest;

  AMCT_INLINE explicit ClampActivation(const ActivationParams& p)
      : lowest(broadcast(p.lowest)), highest(broadcast(p.highest)) {}
  AMCT_INLINE FloatVec value(FloatVec z) const {
    z = z < lowest ? lowest : z;
    return z > highest ? highest : z;
  }
  AMCT_INLINE FloatVec gradient(FloatVec z, FloatVec g) const {
    return zero_unless(~((z <= lowest) | (z >= highest)), g);
  }
};

struct HardswishActivation {
  FloatVec zero = {}, half = broadcast(0.5f), three = broadcast(3.0f), six = broadcast(6.0f);

  AMCT_INLINE explicit HardswishActivation(const ActivationParams&) {}
  AMCT_INLINE FloatVec value(FloatVec z) const {
    FloatVec gate = z + three;
    gate = gate < zero ? zero : gate;
    gate = gate > six ? six : gate;
    return z * gate / six;
  }
  AMCT_INLINE FloatVec gradient(FloatVec z, FloatVec g) const {
    const FloatVec inner = g * (z / three + half);
    return zero_unless(~(z <= -three), z >= three ? g : inner);
  }
};

template <typename Run>
AMCT_INLINE auto with_activation(const ActivationParams& p, const Run& run) {
  if (p.function == ActivationFunction::kHardswish) return run(HardswishActivation(p));
  return run(ClampActivation(p));
}

// A coefficient of each value of a vector that starts at channel `c`: of a plane, or of rows.
struct PlaneCoefficient {
  FloatVec value;
  AMCT_INLINE explicit PlaneCoefficient(float v) : value(broadcast(v)) {}
  AMCT_INLINE FloatVec operator[](int64_t) const { return value; }
};
struct RowCoefficient {
  const float* values;
  AMCT_INLINE explicit RowCoefficient(const float* v) : values(v) {}
  AMCT_INLINE FloatVec operator[](int64_t c) const { return load<FloatVec>(values + c); }
};

// -- statistics

template <typename Term>
AMCT_INLINE double sum_of(const float* x, int64_t n, Term term) {
  SumLanes sums;
  alignas(64) float terms[kSumLanes];
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int k = 0; k < kSumLanes; k += kFloats) store(terms + k, term(load<FloatVec>(x + i + k)));
    sums.add(terms);
  }
  double total = sums.total();
  for (; i < n; ++i) total += static_cast<double>(term(broadcast(x[i]))[0]);
  return total;
}

double sum_values(const float* x, int64_t n) {
  return sum_of(x, n, [](FloatVec v) __attribute__((always_inline)) { return v; });
}

double sum_squared_distances(const float* x, int64_t n, float mean) {
  const FloatVec centre = broadcast(mean);
  return sum_of(x, n, [&](FloatVec v) __attribute__((always_inline)) { return (v - centre) * (v - centre); });
}

// -- forward

// Fake-quantises whole vectors; true where a value is not finite.
template <typename Activation>
struct NormalizeQuantize {
  const Activation& activation;
  const UlqQuantizer<float>& quantizer;
  math::Affine<float> affine;
  float lowest, highest;
  Reciprocal<float> recip;

  template <typename Coefficient>
  AMCT_INLINE bool operator()(const float* x, float* y, int64_t c, const Coefficient& factor,
                              const Coefficient& shift) const {
    const FloatVec a = activation.value(fma(load<FloatVec>(x), factor[c], shift[c]));
    Mask<float> distance = {};
    FloatVec q = quantizer.fast(a, distance);
    bool bad = false;
    if (__builtin_expect(!quantizer.usable || any_ge<float>(distance, recip.max_safe_distance), 0)) {
      for (int i = 0; i < kFloats; ++i) {
        q[i] = math::fake_quantize(a[i], affine, lowest, highest);
        bad |= !math::is_finite(a[i]);
      }
    }
    store(y, q);
    return bad;
  }
};

template <typename Run>
AMCT_INLINE bool with_quantizer(const ActivationParams& a, const UlqForwardParams& p, const Run& run) {
  const math::Affine<float> affine{static_cast<float>(p.scale), static_cast<float>(p.offset)};
  const float lowest = static_cast<float>(p.lowest), highest = static_cast<float>(p.highest);
  const auto recip = reciprocal<float>(p.scale, p.lowest, p.highest);
  const UlqQuantizer<float> quantizer(affine, recip, lowest, highest);
  return with_activation(a, [&](const auto& activation) __attribute__((always_inline)) {
    return run(
        NormalizeQuantize<std::decay_t<decltype(activation)>>{activation, quantizer, affine, lowest, highest, recip});
  });
}

bool batch_norm_ulq_plane(const float* x, float* y, int64_t n, float factor, float shift, const ActivationParams& a,
                          const UlqForwardParams& p) {
  return with_quantizer(a, p, [&](const auto& quantize) __attribute__((always_inline)) {
    const PlaneCoefficient f(factor), s(shift);
    const int64_t whole = n / kFloats * kFloats;
    bool bad = false;
    for (int64_t i = 0; i < whole; i += kFloats) {
      prefetch<kVecBytes>(x + i, kPrefetchDistance);
      prefetch<kVecBytes>(y + i, kPrefetchDistance);
      bad |= quantize(x + i, y + i, 0, f, s);
    }
    if (whole < n) {
      float from[kFloats] = {}, to[kFloats];
      const size_t bytes = static_cast<size_t>(n - whole) * sizeof(float);
      __builtin_memcpy(from, x + whole, bytes);
      bad |= quantize(from, to, 0, f, s);
      __builtin_memcpy(y + whole, to, bytes);
    }
    return bad;
  });
}

bool batch_norm_ulq_rows(const float* x, float* y, int64_t rows, int64_t channels, const float* factor,
                         const float* shift, const ActivationParams& a, const UlqForwardParams& p) {
  return with_quantizer(a, p, [&](const auto& quantize) __attribute__((always_inline)) {
    const RowCoefficient f(factor), s(shift);
    const int64_t whole = channels / kFloats * kFloats;
    const size_t bytes = static_cast<size_t>(channels - whole) * sizeof(float);
    bool bad = false;
    for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
      for (int64_t c = 0; c < whole; c += kFloats) {
        prefetch<kVecBytes>(x + c, kPrefetchDistance);
        bad |= quantize(x + c, y + c, c, f, s);
      }
      if (whole < channels) {
        float from[kFloats] = {}, to[kFloats];
        __builtin_memcpy(from, x + whole, bytes);
        bad |= quantize(from, to, whole, f, s);  // coefficients are padded to whole vectors
        __builtin_memcpy(y + whole, to, bytes);
      }
    }
    return bad;
  });
}

// BatchNorm and either an addition or an activation function.
template <typename Activation, typename Coefficient>
AMCT_INLINE void normalize(const float* x, const float* addend, float* y, int64_t c, const Coefficient& factor,
                           const Coefficient& shift, const Activation& activation) {
  FloatVec z = fma(load<FloatVec>(x), factor[c], shift[c]);
  if (addend) z += load<FloatVec>(addend);
  store(y, activation.value(z));
}

// Less than a vector.
template <typename Activation, typename Coefficient>
AMCT_INLINE void normalize_end(const float* x, const float* addend, float* y, int64_t c, int64_t count,
                               const Coefficient& factor, const Coefficient& shift, const Activation& activation) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  float xs[kFloats] = {}, addends[kFloats] = {}, ys[kFloats];
  __builtin_memcpy(xs, x, bytes);
  if (addend) __builtin_memcpy(addends, addend, bytes);
  normalize(xs, addend ? addends : nullptr, ys, c, factor, shift, activation);
  __builtin_memcpy(y, ys, bytes);
}

void batch_norm_plane(const float* x, const float* addend, float* y, int64_t n, float factor, float shift,
                      const ActivationParams& a) {
  with_activation(a, [&](const auto& activation) __attribute__((always_inline)) {
    const PlaneCoefficient f(factor), s(shift);
    int64_t i = 0;
    for (; i + kFloats <= n; i += kFloats) {
      prefetch<kVecBytes>(x + i, kPrefetchDistance);
      prefetch<kVecBytes>(y + i, kPrefetchDistance);
      normalize(x + i, addend ? addend + i : nullptr, y + i, 0, f, s, activation);
    }
    if (i < n) normalize_end(x + i, addend ? addend + i : nullptr, y + i, 0, n - i, f, s, activation);
    return 0;
  });
}

void batch_norm_rows(const float* x, const float* addend, float* y, int64_t rows, int64_t channels, const float* factor,
                     const float* shift, const ActivationParams& a) {
  with_activation(a, [&](const auto& activation) __attribute__((always_inline)) {
    const RowCoefficient f(factor), s(shift);
    for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
      const float* more = addend ? addend + row * channels : nullptr;
      int64_t c = 0;
      for (; c + kFloats <= channels; c += kFloats) {
        prefetch<kVecBytes>(x + c, kPrefetchDistance);
        normalize(x + c, more ? more + c : nullptr, y + c, c, f, s, activation);
      }
      if (c < channels) normalize_end(x + c, more ? more + c : nullptr, y + c, c, channels - c, f, s, activation);
    }
    return 0;
  });
}

// -- backward

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
  Coefficient factor, shift, mean, mean_gradient, slope;

  template <typename Channels>
  AMCT_INLINE InputGradient(const Output& function, const Channels& p)
      : output(function),
        factor(p.factor),
        shift(p.shift),
        mean(p.mean),
        mean_gradient(p.mean_gradient),
        slope(p.slope) {}

  AMCT_INLINE void operator()(const float* grad, const float* x, float* dx, int64_t c) const {
    const FloatVec v = load<FloatVec>(x);
    const FloatVec dz = output(fma(v, factor[c], shift[c]), load<FloatVec>(grad));
    store(dx, (dz - mean_gradient[c] - (v - mean[c]) * slope[c]) * factor[c]);
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
