// What loops take and return: element types, parameters and results. Plain structs, no tensors.
#pragma once

#include <cstdint>

namespace amct_ext::cpu {

enum Element : int { kFloat32, kFloat64, kBFloat16, kFloat16, kElements };

// Loops prefetch what lies so many bytes beyond what they read, and beyond what they write.
constexpr int64_t kPrefetchDistance = 2048;

// Parameters travel as float64, which holds every float32 exactly; loops on narrower types narrow them back.
struct UlqForwardParams {
  double scale, offset, lowest, highest;
};

struct UlqBackwardParams {
  double scale, clip_max, clip_min;
  double upper, lower;  // x beyond these was clipped
};

struct SymmetricParams {
  double scale, lowest, highest;
  int64_t prefetch_distance = kPrefetchDistance;  // of reads
};

// Sums of the ULQ backward: rounding error times gradient, gradient above, gradient below.
struct UlqSums {
  double rounding_error = 0, above = 0, below = 0;
};

// What follows a BatchNorm: bounds, where those of Hardswish are not used.
enum class ActivationFunction : int { kClamp, kHardswish };
struct ActivationParams {
  ActivationFunction function;
  float lowest, highest;
};

// BatchNorm of a channel as factor * x + shift; the last two for its gradient
// (dz - mean_gradient - (x - mean) * variance_gradient) * factor.
struct BatchNormChannel {
  float factor, shift, mean, mean_gradient, variance_gradient;
};
// The same, an array for each, and kStripPadding values behind it: a loop may read a whole strip at the last channel.
constexpr int kStripPadding = 64;
struct BatchNormRows {
  const float *factor, *shift, *mean, *mean_gradient, *variance_gradient;
};
// Over a channel: of the gradient, and of its product with x - mean.
struct BatchNormSums {
  double gradient = 0, product = 0;
};

struct Range {
  double max, min;  // both NaN where one value is NaN
};

// One range of the search. `end` bounds a symmetric range; offset and code range serve the asymmetric one.
struct Candidate {
  double scale, offset, end, lowest, highest;
};

// What a channel's scale search needs besides the weights.
struct ScaleSearchParams {
  double range_scale, lowest, highest;
};

// A histogram word counts values in its upper bits and adds up their positions within the bin in the lower ones: one
// addition per value. It holds 2^24 values before it must be flushed.
constexpr int kMaxBinBits = 15, kFractionBits = 15, kCountShift = 40;
constexpr uint64_t kCountOne = uint64_t{1} << kCountShift;
constexpr int64_t kHistogramCapacity = (int64_t{1} << (64 - kCountShift)) - 1;

// Sum of squares of 32-bit integers, exact: 2^64 of them fit.
__extension__ typedef unsigned __int128 WideSum;

}  // namespace amct_ext::cpu
