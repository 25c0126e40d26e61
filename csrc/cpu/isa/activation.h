// ULQ: fake quantisation of an activation and its gradients.
#pragma once

#include "cpu/isa/scalar.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

template <typename T>
AMCT_INLINE void ulq_exact(const T* __restrict x, T* __restrict y, int64_t n, math::Affine<Acc<T>> affine,
                           Acc<T> lowest, Acc<T> highest) {
  for (int64_t i = 0; i < n; ++i) y[i] = narrow<T>(math::fake_quantize(widen(x[i]), affine, lowest, highest));
}

// Returns the largest distance from an integer, as bits; a value that is not finite makes it large.
template <typename T>
AMCT_INLINE BitsOf<Acc<T>> ulq_fast(const T* __restrict x, T* __restrict y, int64_t n, math::Affine<Acc<T>> affine,
                                    Acc<T> inverse, Acc<T> lowest, Acc<T> highest) {
  BitsOf<Acc<T>> farthest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc<T> t = widen(x[i]) * inverse + affine.offset, code = math::round_even(t);
    const BitsOf<Acc<T>> distance = magnitude_bits(t - code);
    farthest = distance > farthest ? distance : farthest;
    y[i] = narrow<T>((math::clamp(code, lowest, highest) - affine.offset) * affine.scale);
  }
  return farthest;
}

template <typename T>
AMCT_INLINE Bits<T> largest_bits(const T* __restrict x, int64_t n) {
  Bits<T> most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits<T> bits = magnitude_bits(x[i]);
    most = bits > most ? bits : most;
  }
  return most;
}

template <typename T>
bool ulq_forward(const void* x_, void* y_, int64_t n, const UlqForward& p) {
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  const math::Affine<Acc<T>> affine{static_cast<Acc<T>>(p.scale), static_cast<Acc<T>>(p.offset)};
  const Acc<T> lowest = static_cast<Acc<T>>(p.lowest), highest = static_cast<Acc<T>>(p.highest);
  const auto fast = reciprocal<Acc<T>>(p.scale, p.lowest, p.highest);
  const auto limit = as<BitsOf<Acc<T>>>(fast.limit);
  Bits<T> most = 0;
  for (int64_t begin = 0; begin < n; begin += kRetryOf<T>) {
    const int64_t count = n - begin < kRetryOf<T> ? n - begin : kRetryOf<T>;
    const Bits<T> largest = largest_bits(x + begin, count);
    most = largest > most ? largest : most;
    converted(x + begin, y + begin, count, [&](const auto* in, auto* out) __attribute__((always_inline)) {
      if (!fast.usable || ulq_fast(in, out, count, affine, fast.inverse, lowest, highest) >= limit) {
        ulq_exact(in, out, count, affine, lowest, highest);
      }
    });
  }
  return most >= Traits<T>::kInfinity;
}

template <typename T>
void ulq_backward(const void* grad_, const void* x_, void* dx_, int64_t n, const UlqBackward& p, UlqSums& out) {
  const T* __restrict grad = static_cast<const T*>(grad_);
  const T* __restrict x = static_cast<const T*>(x_);
  T* __restrict dx = static_cast<T*>(dx_);
  const Acc<T> scale = static_cast<Acc<T>>(p.scale), clip_max = static_cast<Acc<T>>(p.clip_max),
               clip_min = static_cast<Acc<T>>(p.clip_min), upper = static_cast<Acc<T>>(p.upper),
               lower = static_cast<Acc<T>>(p.lower);
  constexpr int kStep = 512;
  LaneSums error, above, below;
  // Terms of a step go through the first-level cache: one loop of arithmetic, then one of additions.
  Acc<T> errors[kStep], aboves[kStep], belows[kStep];
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int count = n - begin < kStep ? static_cast<int>(n - begin) : kStep;
    const T* __restrict gs = grad + begin;
    const T* __restrict xs = x + begin;
    T* __restrict ds = dx + begin;
    for (int i = 0; i < count; ++i) {
      const Acc<T> v = widen(xs[i]), g = widen(gs[i]);
      const bool over = v > upper, under = v < lower;
      Acc<T> z = under ? clip_min : v;
      z = (over ? clip_max : z) / scale;
      errors[i] = (math::round_even(z) - z) * g;
      const Acc<T> high = over ? g : Acc<T>(0), low = under ? g : Acc<T>(0);
      aboves[i] = high;
      belows[i] = low;
      ds[i] = masked(gs[i], !(over | under));
    }
    const int padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int i = count; i < padded; ++i) errors[i] = aboves[i] = belows[i] = 0;
    for (int i = 0; i < padded; i += kLanes) {
      error.add(errors + i);
      above.add(aboves + i);
      below.add(belows + i);
    }
  }
  out.error += error.total();
  out.above += above.total();
  out.below += below.total();
}

}  // namespace
}  // namespace amct_ext::cpu
