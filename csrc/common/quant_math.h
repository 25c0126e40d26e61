// The scalar numerics of every op, once, for every device and instruction set.
//
// Division is true division, rounding is half to even, comparisons are written so that NaN passes through. Everything
// here must be compiled without contraction (-ffp-contract=off, --fmad=false): the results are compared bit for bit.
#pragma once

#include <cfloat>
#include <cmath>

#if defined(__CUDACC__)
#define AMCT_INLINE __host__ __device__ __forceinline__
#define AMCT_TABLE __device__ constexpr
#else
#define AMCT_TABLE constexpr
// Forced: an out-of-line copy compiled for a newer instruction set could be picked by the linker for an older machine.
#define AMCT_INLINE inline __attribute__((always_inline))
#endif

namespace amct_ext::math {

// The ratios of the range search: torch.arange(0.7, 1.3, 0.01, dtype=float32), whose last bits depend on how it is
// vectorised, fixed to what AMCT gets on a CPU.
constexpr int kCandidates = 61;
AMCT_TABLE float kRatios[kCandidates] = {
    0.699999988f, 0.709999979f, 0.719999969f, 0.729999959f, 0.74000001f,  0.75f,        0.75999999f,  0.769999981f,
    0.779999971f, 0.789999962f, 0.799999952f, 0.809999943f, 0.819999993f, 0.829999983f, 0.839999974f, 0.849999964f,
    0.860000014f, 0.870000005f, 0.879999995f, 0.889999986f, 0.900000036f, 0.910000026f, 0.920000017f, 0.930000007f,
    0.939999998f, 0.949999988f, 0.959999979f, 0.969999969f, 0.980000019f, 0.99000001f,  1.0f,         1.00999999f,
    1.01999998f,  1.02999997f,  1.03999996f,  1.04999995f,  1.05999994f,  1.06999993f,  1.07999992f,  1.09000003f,
    1.10000002f,  1.11000001f,  1.12f,        1.13f,        1.13999999f,  1.14999998f,  1.15999997f,  1.17000008f,
    1.17999995f,  1.19000006f,  1.20000005f,  1.21000004f,  1.22000003f,  1.23000002f,  1.24000001f,  1.25f,
    1.25999999f,  1.26999998f,  1.27999997f,  1.28999996f,  1.29999995f};

// The factors on a weight's range scale that the scale search tries: eight in each of the first two powers of two,
// four in each of the four below, where the error is flat. The range itself comes first.
constexpr int kScaleFactors = 32;
AMCT_INLINE constexpr double scale_factor(int i) {
  return i < 16 ? (16 - i % 8) / static_cast<double>(16 << i / 8)
                : (8 - i % 4) / static_cast<double>(32 << (i - 16) / 4);
}

// The shifts that the shift search tries: 1 to 16.
constexpr int kShifts = 16;

// The distance from 1 to the next number of the arithmetic type.
template <typename Acc>
AMCT_INLINE constexpr Acc epsilon() {
  return sizeof(Acc) == 8 ? Acc(DBL_EPSILON) : Acc(FLT_EPSILON);
}

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
#if defined(__CUDACC__)
  return ::rintf(v);
#elif defined(__SSE4_1__) || defined(__aarch64__)
  return __builtin_rintf(v);
#else
  const float magic = 8388608.0f, size = __builtin_fabsf(v);
  const float rounded = __builtin_copysignf((size + magic) - magic, v);
  return size < magic ? rounded : v;
#endif
}

AMCT_INLINE double round_even(double v) {
#if defined(__CUDACC__)
  return ::rint(v);
#elif defined(__SSE4_1__) || defined(__aarch64__)
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

// How well the codes of one scale that is tried fit: `products` the sum of weight times code, `squares` that of code
// squared. The best scale for these codes is products / squares; it takes products^2 / squares off the squared error.
AMCT_INLINE double fit_gain(double products, double squares) {
  const double gain = products * products / squares;
  return squares > 0 && is_finite(gain) ? gain : 0;
}

// The scale of the first best fit, `range_scale` where none is any good; the sums of the scales tried stand in pairs.
AMCT_INLINE double best_scale(const double* sums, double range_scale) {
  double best = 0, scale = range_scale;
  for (int i = 0; i < kScaleFactors; ++i) {
    const double gain = fit_gain(sums[2 * i], sums[2 * i + 1]);
    if (gain > best) {
      best = gain;
      scale = at_least(sums[2 * i] / sums[2 * i + 1], static_cast<double>(FLT_EPSILON));
    }
  }
  return scale;
}

// Whether quantising costs a channel: less than a tenth of its norm is left. From the sums of squares before and
// after.
AMCT_INLINE bool channel_is_lost(double before, double after) { return 100 * after < before; }

// The scale that a lost channel takes; the one it has where its range gives none.
template <typename Acc>
AMCT_INLINE double repaired_scale(Acc largest, Acc smallest, int num_bits, double scale) {
  const CodeRange range = code_range(num_bits);
  const Acc top = largest < Acc(0) ? -largest : largest, bottom = smallest < Acc(0) ? -smallest : smallest;
  const Acc widest = top < bottom ? bottom / static_cast<Acc>(-range.lowest) : top / static_cast<Acc>(range.highest);
  return widest >= Acc(FLT_EPSILON) && is_finite(widest) ? static_cast<double>(widest) : scale;
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
