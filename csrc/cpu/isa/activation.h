// ULQ: fake quantisation of an activation and its gradients.
#pragma once

#include "cpu/isa/scalar.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

template <typename T>
bool ulq_forward(const void* x_, void* y_, int64_t n, const UlqForward& p) {
  const T* __restrict x = static_cast<const T*>(x_);
  T* __restrict y = static_cast<T*>(y_);
  const math::Affine<Acc<T>> affine{static_cast<Acc<T>>(p.scale), static_cast<Acc<T>>(p.offset)};
  const Acc<T> lowest = static_cast<Acc<T>>(p.lowest), highest = static_cast<Acc<T>>(p.highest);
  Bits<T> most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T v = x[i];
    const Bits<T> bits = magnitude_bits(v);
    most = bits > most ? bits : most;
    y[i] = narrow<T>(math::fake_quantize(widen(v), affine, lowest, highest));
  }
  return most >= Traits<T>::kInfinity;
}

// One step handles kLanes values; each lane has its own float64 sums, so the order of additions does not depend on the
// instruction set. The lanes are added up in order at the end.
constexpr int kLanes = 16;

template <typename T>
struct UlqLanes {
  double error[kLanes] = {}, above[kLanes] = {}, below[kLanes] = {};
};

template <typename T>
AMCT_INLINE void ulq_backward_step(const T* __restrict grad, const T* __restrict x, T* __restrict dx, int count,
                                   Acc<T> scale, Acc<T> clip_max, Acc<T> clip_min, Acc<T> upper, Acc<T> lower,
                                   UlqLanes<T>& sums) {
  for (int i = 0; i < count; ++i) {
    const Acc<T> v = widen(x[i]), g = widen(grad[i]);
    const bool above = v > upper, below = v < lower;
    const Acc<T> z = (above ? clip_max : below ? clip_min : v) / scale;
    sums.error[i] += static_cast<double>((math::round_even(z) - z) * g);
    sums.above[i] += static_cast<double>(above ? g : Acc<T>(0));
    sums.below[i] += static_cast<double>(below ? g : Acc<T>(0));
    dx[i] = above || below ? narrow<T>(Acc<T>(0)) : grad[i];
  }
}

template <typename T>
void ulq_backward(const void* grad_, const void* x_, void* dx_, int64_t n, const UlqBackward& p, UlqSums& out) {
  const T* grad = static_cast<const T*>(grad_);
  const T* x = static_cast<const T*>(x_);
  T* dx = static_cast<T*>(dx_);
  const Acc<T> scale = static_cast<Acc<T>>(p.scale), clip_max = static_cast<Acc<T>>(p.clip_max),
               clip_min = static_cast<Acc<T>>(p.clip_min), upper = static_cast<Acc<T>>(p.upper),
               lower = static_cast<Acc<T>>(p.lower);
  UlqLanes<T> sums;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    ulq_backward_step(grad + i, x + i, dx + i, kLanes, scale, clip_max, clip_min, upper, lower, sums);
  }
  ulq_backward_step(grad + i, x + i, dx + i, static_cast<int>(n - i), scale, clip_max, clip_min, upper, lower, sums);
  for (int lane = 0; lane < kLanes; ++lane) {
    out.error += sums.error[lane];
    out.above += sums.above[lane];
    out.below += sums.below[lane];
  }
}

}  // namespace
}  // namespace amct_ext::cpu
