// The scalar numerics of every op, once, for every device and instruction set.
//
// Division is true division, rounding is half to even, comparisons are written so that NaN passes through. Everything
// here must be compiled without contraction (-ffp-contract=off, --fmad=false): the results are compared bit for bit.
#pragma once

#include <cfloat>
#include <cmath>

#if defined(__CUDACC__)
#define AMCT_INLINE __host__ __device__ __forceinline__
#else
// Forced: an out-of-line copy compiled for a newer instruction set could be picked by the linker for an older machine.
#define AMCT_INLINE inline __attribute__((always_inline))
#endif

namespace amct_ext::math {

struct CodeRange {
  double lowest;
  double highest;
};

AMCT_INLINE CodeRange code_range(int num_bits) {
  const double half = static_cast<double>(1LL << (num_bits - 1));
  return {-half, half - 1};
}

template <typename Acc>
AMCT_INLINE bool is_finite(Acc v) {
  return v - v == Acc(0);
}

// NaN stays NaN: both comparisons are false for it.
template <typename Acc>
AMCT_INLINE Acc clamp(Acc v, Acc low, Acc high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

template <typename Acc>
AMCT_INLINE Acc at_least(Acc v, Acc low) {
  return v < low ? low : v;
}

// Half to even, the sign of zero kept. Where no rounding instruction exists, adding and taking away 2^(digits-1)
// rounds.
AMCT_INLINE float round_even(float v) {
#if defined(__CUDACC__) || defined(__SSE4_1__) || defined(__aarch64__)
  return __builtin_rintf(v);
#else
  const float magic = 8388608.0f, size = __builtin_fabsf(v);
  const float rounded = __builtin_copysignf((size + magic) - magic, v);
  return size < magic ? rounded : v;
#endif
}

AMCT_INLINE double round_even(double v) {
#if defined(__CUDACC__) || defined(__SSE4_1__) || defined(__aarch64__)
  return __builtin_rint(v);
#else
  const double magic = 4503599627370496.0, size = __builtin_fabs(v);
  const double rounded = __builtin_copysign((size + magic) - magic, v);
  return size < magic ? rounded : v;
#endif
}

// Clips that have collapsed or changed sign fall back to the previous ones (where those are finite); zero stays inside.
template <typename Acc>
AMCT_INLINE void effective_clips(Acc& clip_max, Acc& clip_min, Acc prev_max, Acc prev_min, bool fixed_min) {
  if (fixed_min) clip_min = Acc(0);
  const bool collapsed = clip_max - clip_min <= Acc(FLT_EPSILON);
  const bool take_max = is_finite(prev_max) && (collapsed || clip_max < Acc(0));
  const bool take_min = !fixed_min && is_finite(prev_min) && (collapsed || clip_min > Acc(0));
  if (take_max) clip_max = prev_max;
  if (take_min) clip_min = prev_min;
  if (clip_max < Acc(0)) clip_max = Acc(0);
  if (clip_min > Acc(0)) clip_min = Acc(0);
}

template <typename Acc>
struct Affine {
  Acc scale;
  Acc offset;  // an integer
};

// Scale and offset of a range that contains zero.
template <typename Acc>
AMCT_INLINE Affine<Acc> affine(Acc clip_max, Acc clip_min, int num_bits) {
  const Acc lowest = static_cast<Acc>(code_range(num_bits).lowest);
  const Acc levels = static_cast<Acc>((1LL << num_bits) - 1);
  const Acc scale = (clip_max - clip_min) / levels;
  if (scale < Acc(FLT_EPSILON)) return {Acc(1), lowest};
  return {scale, round_even(lowest - clip_min / scale)};
}

// Scale without offset; one more level below zero than above, used when the negative extreme is the larger one.
template <typename Acc>
AMCT_INLINE Acc symmetric_scale(Acc largest, Acc smallest, int num_bits) {
  const CodeRange range = code_range(num_bits);
  const Acc top = largest < Acc(0) ? -largest : largest, bottom = smallest < Acc(0) ? -smallest : smallest;
  const Acc scale = top < bottom ? bottom / static_cast<Acc>(-range.lowest) : top / static_cast<Acc>(range.highest);
  return scale < Acc(FLT_EPSILON) ? Acc(1) : scale;
}

template <typename Acc>
AMCT_INLINE Acc code(Acc v, Acc scale, Acc lowest, Acc highest) {
  return clamp(round_even(v / scale), lowest, highest);
}

template <typename Acc>
AMCT_INLINE Acc fake_quantize(Acc v, Acc scale, Acc lowest, Acc highest) {
  return code(v, scale, lowest, highest) * scale;
}

template <typename Acc>
AMCT_INLINE Acc fake_quantize(Acc v, Affine<Acc> affine, Acc lowest, Acc highest) {
  return (clamp(round_even(v / affine.scale + affine.offset), lowest, highest) - affine.offset) * affine.scale;
}

}  // namespace amct_ext::math
