// BatchNorm, an activation function and ULQ fake quantisation (or an addition) in one pass. float32.
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

}  // namespace
}  // namespace amct_ext::cpu
