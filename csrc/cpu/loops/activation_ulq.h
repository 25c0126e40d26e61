// ULQ: fake quantisation of an activation and its gradients.
#pragma once

#include "cpu/dispatch.h"
#include "simd/fixed_order_sum.h"
#include "simd/vec2.h"

namespace amct_ext::cpu {
namespace {

template <typename T>
struct UlqRows {
  using A = Acc<T>;
  Row<A> scale, inverse, offset, lowest, highest, lowest_step, highest_step, signed_zero, zero = {};
  bool usable;

  AMCT_INLINE UlqRows(math::Affine<A> affine, const Reciprocal<A>& fast, A low, A high)
      : scale(filled(affine.scale)),
        inverse(filled(fast.inverse)),
        offset(filled(affine.offset)),
        lowest(filled(low)),
        highest(filled(high)),
        lowest_step(filled(low - affine.offset)),
        highest_step(filled(high - affine.offset)) {
    const bool plus_zero = as<Bits<A>>(affine.offset) == 0;
    signed_zero = filled(plus_zero ? A(-0.0) : A(0.0));
    // Where the sign of a result depends on it, no product may vanish.
    usable = fast.usable && (!plus_zero || affine.scale <= A(0.5));
  }

  // What the division gives.
  AMCT_INLINE Row<A> exact(Row<A> v) const {
    return (clamped(rounded(v / scale + offset), lowest, highest) - offset) * scale;
  }

  // The same by the reciprocal, noting how far values are from an integer. The offset is an integer, so a value can be
  // rounded without it: taking it off again then leaves bounds that have moved, and zeros: they are +0, as the
  // difference of equal numbers is, but for an offset of +0, where what rounds to zero keeps its sign and a -0 loses
  // it.
  AMCT_INLINE Row<A> fast(Row<A> v, Mask<A>& farthest) const {
    const Row<A> t = product(v, inverse, zero), code = rounded(t);
    farthest = larger(magnitude_bits_of<A>(t - code), farthest);
    return product(clamped(code, lowest_step, highest_step), scale, signed_zero);
  }
};

template <typename T>
AMCT_INLINE bool finite(const T* x, int64_t n) {
  Bits<T> most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits<T> bits = magnitude_bits(x[i]);
    most = bits > most ? bits : most;
  }
  return most < Traits<T>::kInfinity;
}

template <typename T>
bool ulq_forward(const void* x_, void* y_, int64_t n, const UlqForward& p) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  const math::Affine<A> affine{static_cast<A>(p.scale), static_cast<A>(p.offset)};
  const A lowest = static_cast<A>(p.lowest), highest = static_cast<A>(p.highest);
  const auto each = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] = narrow<T>(math::fake_quantize(widen(x[i]), affine, lowest, highest));
    return finite(x + begin, end - begin);
  };
  const auto fast = reciprocal<A>(p.scale, p.lowest, p.highest);
  const UlqRows<T> rows(affine, fast, lowest, highest);
  if (!rows.usable) return !each(0, n);

  constexpr int kGroup = 2 * kPair<T>;
  const int64_t whole = n / kGroup * kGroup;
  bool good = true;
  for (int64_t i = 0; i < whole; i += kGroup) {
    bring<kGroup * sizeof(T)>(x + i, kLead);
    bring<kGroup * sizeof(T)>(y + i, kLead);
    Mask<A> farthest = {};
    const auto fast_pair = [&](const T* from, T* to) __attribute__((always_inline)) {
      const Pair<T> v = load_pair(from);
      store_pair(to, Pair<T>{rows.fast(v.first, farthest), rows.fast(v.second, farthest)});
    };
    fast_pair(x + i, y + i);
    fast_pair(x + i + kPair<T>, y + i + kPair<T>);
    if (__builtin_expect(reach<A>(farthest, fast.limit), 0)) {
      // What is not finite has no distance: NaN.
      if (reach<A>(farthest, as<A>(Traits<A>::kInfinity))) {
        good &= each(i, i + kGroup);
        continue;
      }
      for (int64_t k = i; k < i + kGroup; k += kPair<T>) {
        const Pair<T> v = load_pair(x + k);
        store_pair(y + k, Pair<T>{rows.exact(v.first), rows.exact(v.second)});
      }
    }
  }
  return !(good & each(whole, n));
}

template <typename T>
void ulq_backward(const void* grad_, const void* x_, void* dx_, int64_t n, const UlqBackward& p, UlqSums& out) {
  using A = Acc<T>;
  constexpr int kGroup = GroupSums<A>::kGroup, kStep = kGroup * GroupSums<A>::kSteps;
  const T* grad = static_cast<const T*>(grad_);
  const T* x = static_cast<const T*>(x_);
  T* dx = static_cast<T*>(dx_);
  const Row<A> scale = filled(static_cast<A>(p.scale)), clip_max = filled(static_cast<A>(p.clip_max)),
               clip_min = filled(static_cast<A>(p.clip_min)), upper = filled(static_cast<A>(p.upper)),
               lower = filled(static_cast<A>(p.lower)), infinity = filled(as<A>(Traits<A>::kInfinity));
  GroupSums<A> error, above, below;
  const auto add_error = [&](int lane, Row<A> v, Row<A> g) __attribute__((always_inline)) {
    const Row<A> z = v / scale;
    error.add(lane, (rounded(z) - z) * g);
  };
  const auto row = [&](int lane, Row<A> v, Row<A> g) __attribute__((always_inline)) {
    const Mask<A> over = v > upper, under = v < lower;
    add_error(lane, over ? clip_max : under ? clip_min : v, g);
    above.add(lane, where(over, g));
    below.add(lane, where(under, g));
    return ~(over | under);
  };
  bool clipped;  // whether a value of the step was
  const auto group = [&](const T* gs, const T* xs, T* ds) __attribute__((always_inline)) {
    bring<kGroup * sizeof(T)>(gs, kLead);
    bring<kGroup * sizeof(T)>(xs, kLead);
    bring<kGroup * sizeof(T)>(ds, kLead);
    Row<A> largest = -infinity, smallest = infinity;
    for (int k = 0; k < kGroup; k += kPair<T>) {
      const Pair<T> v = load_pair(xs + k);
      largest = larger(v.second, larger(v.first, largest));
      smallest = smaller(v.second, smaller(v.first, smallest));
    }
    // No sum is -0, so adding +0 changes none: where no value is clipped, two of the three stay as they are.
    if (any((largest > upper) | (smallest < lower))) [[unlikely]] {
      clipped = true;
      for (int k = 0; k < kGroup; k += kPair<T>) {
        const Pair<T> v = load_pair(xs + k), g = load_pair(gs + k);
        const Mask<A> first = row(lane_of<T>(k), v.first, g.first),
                      second = row(lane_of<T>(k + kSecond<T>), v.second, g.second);
        store_kept(ds + k, gs + k, first, second);
      }
      return;
    }
#pragma GCC unroll 8
    for (int k = 0; k < kGroup; k += kPair<T>) {
      const Pair<T> v = load_pair(xs + k), g = load_pair(gs + k);
      add_error(lane_of<T>(k), v.first, g.first);
      add_error(lane_of<T>(k + kSecond<T>), v.second, g.second);
      for (int i = 0; i < kPair<T>; i += kWidth<T>) store_row(ds + k + i, load(gs + k + i));
    }
  };
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int64_t end = n - begin < kStep ? n : begin + kStep;
    int64_t i = begin;
    clipped = false;
    for (; i + kGroup <= end; i += kGroup) group(grad + i, x + i, dx + i);
    if (i < end) {
      T gs[kGroup] = {}, xs[kGroup] = {}, ds[kGroup];
      __builtin_memcpy(gs, grad + i, (end - i) * sizeof(T));
      __builtin_memcpy(xs, x + i, (end - i) * sizeof(T));
      group(gs, xs, ds);
      __builtin_memcpy(dx + i, ds, (end - i) * sizeof(T));
    }
    error.flush();
    if (clipped) {
      above.flush();
      below.flush();
    }
  }
  out.error += error.sums.total();
  out.above += above.sums.total();
  out.below += below.sums.total();
}

}  // namespace
}  // namespace amct_ext::cpu
