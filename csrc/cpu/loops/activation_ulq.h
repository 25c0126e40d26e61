// ULQ: fake quantisation of an activation and its gradients.
#pragma once

#include "cpu/loop_params.h"
#include "simd/fixed_order_sum.h"
#include "simd/reciprocal.h"
#include "simd/vec2.h"

namespace amct_ext::cpu {
namespace {

// Fake quantisation of a vector of values.
template <typename T>
struct UlqQuantizer {
  using A = Acc<T>;
  Vec<A> scale, inverse, offset, lowest, highest, lowest_shifted, highest_shifted, signed_zero, zero = {};
  bool usable;

  AMCT_INLINE UlqQuantizer(math::Affine<A> affine, const Reciprocal<A>& recip, A low, A high)
      : scale(broadcast(affine.scale)),
        inverse(broadcast(recip.inverse)),
        offset(broadcast(affine.offset)),
        lowest(broadcast(low)),
        highest(broadcast(high)),
        lowest_shifted(broadcast(low - affine.offset)),
        highest_shifted(broadcast(high - affine.offset)) {
    const bool plus_zero = bit_cast<Bits<A>>(affine.offset) == 0;
    signed_zero = broadcast(plus_zero ? A(-0.0) : A(0.0));
    // With an offset of +0 results keep the sign of zero, which a product that underflows would lose.
    usable = recip.usable && (!plus_zero || affine.scale <= A(0.5));
  }

  // By division.
  AMCT_INLINE Vec<A> exact(Vec<A> v) const {
    return (clamp(round_even(v / scale + offset), lowest, highest) - offset) * scale;
  }

  // By the reciprocal; `max_distance` collects the distances from an integer, as bit patterns. The offset is an
  // integer, so v is rounded without it and clamped to bounds less the offset. That leaves the sign of zeros: the exact
  // form subtracts equal numbers, which gives +0, so +0 is added; with an offset of +0 it keeps the sign, so -0 is
  // added.
  AMCT_INLINE Vec<A> fast(Vec<A> v, Mask<A>& max_distance) const {
    const Vec<A> t = mul_add_zero(v, inverse, zero), code = round_even(t);
    max_distance = max(abs_bits<A>(t - code), max_distance);
    return mul_add_zero(clamp(code, lowest_shifted, highest_shifted), scale, signed_zero);
  }
};

// Whether no value is Inf or NaN.
template <typename T>
AMCT_INLINE bool all_finite(const T* x, int64_t n) {
  Bits<T> most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits<T> bits = abs_bits(x[i]);
    most = bits > most ? bits : most;
  }
  return most < Traits<T>::kInfBits;
}

template <typename T>
bool ulq_forward(const void* x_, void* y_, int64_t n, const UlqForwardParams& p) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  const math::Affine<A> affine{static_cast<A>(p.scale), static_cast<A>(p.offset)};
  const A lowest = static_cast<A>(p.lowest), highest = static_cast<A>(p.highest);
  const auto by_element = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] = narrow<T>(math::fake_quantize(widen(x[i]), affine, lowest, highest));
    return all_finite(x + begin, end - begin);
  };
  const auto recip = reciprocal<A>(p.scale, p.lowest, p.highest);
  const UlqQuantizer<T> quantizer(affine, recip, lowest, highest);
  if (!quantizer.usable) return !by_element(0, n);

  constexpr int kStep = 2 * kLanes2<T>;
  const int64_t whole = n / kStep * kStep;
  bool good = true;
  for (int64_t i = 0; i < whole; i += kStep) {
    prefetch<kStep * sizeof(T)>(x + i, kPrefetchDistance);
    prefetch<kStep * sizeof(T)>(y + i, kPrefetchDistance);
    Mask<A> max_distance = {};
    const auto quantize2 = [&](const T* from, T* to) __attribute__((always_inline)) {
      const Vec2<T> v = load2(from);
      store2(to, Vec2<T>{quantizer.fast(v.first, max_distance), quantizer.fast(v.second, max_distance)});
    };
    quantize2(x + i, y + i);
    quantize2(x + i + kLanes2<T>, y + i + kLanes2<T>);
    if (__builtin_expect(any_ge<A>(max_distance, recip.max_safe_distance), 0)) {
      // Values that are not finite have NaN as their distance.
      if (any_ge<A>(max_distance, bit_cast<A>(Traits<A>::kInfBits))) {
        good &= by_element(i, i + kStep);
        continue;
      }
      for (int64_t k = i; k < i + kStep; k += kLanes2<T>) {
        const Vec2<T> v = load2(x + k);
        store2(y + k, Vec2<T>{quantizer.exact(v.first), quantizer.exact(v.second)});
      }
    }
  }
  return !(good & by_element(whole, n));
}

// The sums and, with kWriteDx, dx. One long function: its lambdas share constants and sums, and the compiler keeps them
// in registers.
template <typename T, bool kWriteDx>
// NOLINTNEXTLINE(readability-function-size)
void ulq_gradients(const T* grad, const T* x, T* dx, int64_t n, const UlqBackwardParams& p, UlqSums& out) {
  using A = Acc<T>;
  constexpr int kWidth = CascadeSum<A>::kWidth, kChunk = kWidth * CascadeSum<A>::kSteps;
  const Vec<A> scale = broadcast(static_cast<A>(p.scale)), clip_max = broadcast(static_cast<A>(p.clip_max)),
               clip_min = broadcast(static_cast<A>(p.clip_min)), upper = broadcast(static_cast<A>(p.upper)),
               lower = broadcast(static_cast<A>(p.lower)), infinity = broadcast(bit_cast<A>(Traits<A>::kInfBits));
  CascadeSum<A> error, above, below;
  const auto add_error = [&](int lane, Vec<A> v, Vec<A> g) __attribute__((always_inline)) {
    const Vec<A> z = v / scale;
    error.add(lane, (round_even(z) - z) * g);
  };
  const auto add_clipped = [&](int lane, Vec<A> v, Vec<A> g) __attribute__((always_inline)) {
    const Mask<A> over = v > upper, under = v < lower;
    add_error(lane, over ? clip_max : under ? clip_min : v, g);
    above.add(lane, zero_unless(over, g));
    below.add(lane, zero_unless(under, g));
    return ~(over | under);
  };
  bool clipped;  // whether a value of the chunk was clipped
  const auto step = [&](const T* gs, const T* xs, T* ds) __attribute__((always_inline)) {
    prefetch<kWidth * sizeof(T)>(gs, kPrefetchDistance);
    prefetch<kWidth * sizeof(T)>(xs, kPrefetchDistance);
    if constexpr (kWriteDx) prefetch<kWidth * sizeof(T)>(ds, kPrefetchDistance);
    Vec<A> largest = -infinity, smallest = infinity;
    for (int k = 0; k < kWidth; k += kLanes2<T>) {
      const Vec2<T> v = load2(xs + k);
      largest = max(v.second, max(v.first, largest));
      smallest = min(v.second, min(v.first, smallest));
    }
    // No partial sum is -0, so adding +0 changes none: without clipped values `above` and `below` stay as they are.
    if (any((largest > upper) | (smallest < lower))) [[unlikely]] {
      clipped = true;
      for (int k = 0; k < kWidth; k += kLanes2<T>) {
        const Vec2<T> v = load2(xs + k), g = load2(gs + k);
        const Mask<A> first = add_clipped(lane_of<T>(k), v.first, g.first),
                      second = add_clipped(lane_of<T>(k + kSecondStart<T>), v.second, g.second);
        if constexpr (kWriteDx) copy2_masked(ds + k, gs + k, first, second);
      }
      return;
    }
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; k += kLanes2<T>) {
      const Vec2<T> v = load2(xs + k), g = load2(gs + k);
      add_error(lane_of<T>(k), v.first, g.first);
      add_error(lane_of<T>(k + kSecondStart<T>), v.second, g.second);
      if constexpr (kWriteDx) {
        for (int i = 0; i < kLanes2<T>; i += kLanes<T>) store(ds + k + i, load_bits(gs + k + i));
      }
    }
  };
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = n - begin < kChunk ? n : begin + kChunk;
    int64_t i = begin;
    clipped = false;
    for (; i + kWidth <= end; i += kWidth) step(grad + i, x + i, kWriteDx ? dx + i : nullptr);
    if (i < end) {
      T gs[kWidth] = {}, xs[kWidth] = {}, ds[kWidth];
      __builtin_memcpy(gs, grad + i, (end - i) * sizeof(T));
      __builtin_memcpy(xs, x + i, (end - i) * sizeof(T));
      step(gs, xs, ds);
      if constexpr (kWriteDx) __builtin_memcpy(dx + i, ds, (end - i) * sizeof(T));
    }
    error.flush();
    if (clipped) {
      above.flush();
      below.flush();
    }
  }
  out.rounding_error += error.sums.total();
  out.above += above.sums.total();
  out.below += below.sums.total();
}

template <typename T>
void ulq_backward(const void* grad, const void* x, void* dx, int64_t n, const UlqBackwardParams& p, UlqSums& out) {
  ulq_gradients<T, true>(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(dx), n, p, out);
}

void ulq_clip_sums(const float* grad, const float* x, int64_t n, const UlqBackwardParams& p, UlqSums& out) {
  ulq_gradients<float, false>(grad, x, nullptr, n, p, out);
}

void ulq_relu_backward(const float* grad, const float* y, const float* addend, float* dx, int64_t n,
                       const UlqBackwardParams& p) {
  constexpr int kStep = kLanes<float>;
  const Vec<float> upper = broadcast(static_cast<float>(p.upper)), lower = broadcast(static_cast<float>(p.lower));
  // Comparisons let NaN pass, as those of the two ops do.
  const auto step = [&](const float* gs, const float* ys, const float* more, float* to) __attribute__((always_inline)) {
    const Vec<float> v = load<Vec<float>>(ys);
    Vec<float> g = zero_unless(~((v > upper) | (v < lower)), load<Vec<float>>(gs));
    if (more) g = load<Vec<float>>(more) + g;
    store(to, zero_unless(~(v <= Vec<float>{}), g));
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    prefetch<kVecBytes>(grad + i, kPrefetchDistance);
    prefetch<kVecBytes>(y + i, kPrefetchDistance);
    prefetch<kVecBytes>(dx + i, kPrefetchDistance);
    step(grad + i, y + i, addend ? addend + i : nullptr, dx + i);
  }
  if (i < n) {
    const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
    float gs[kStep] = {}, ys[kStep] = {}, addends[kStep] = {}, ds[kStep];
    __builtin_memcpy(gs, grad + i, bytes);
    __builtin_memcpy(ys, y + i, bytes);
    if (addend) __builtin_memcpy(addends, addend + i, bytes);
    step(gs, ys, addend ? addends : nullptr, ds);
    __builtin_memcpy(dx + i, ds, bytes);
  }
}

}  // namespace
}  // namespace amct_ext::cpu
