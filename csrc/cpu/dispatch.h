// Runtime dispatch of the compiled loops: raw pointers, one thread, no tensors. Each instruction set has one table of
// function pointers (loops/table.cpp); `kernels()` is the best one for this processor. Arrays run over the element
// types in the order of `Element`.
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
  double error = 0, above = 0, below = 0;
};

struct Range {
  double largest, smallest;  // both NaN where one value is NaN
};

// One range of the search. `end` bounds a symmetric range; offset and code range serve the asymmetric one.
struct Candidate {
  double scale, offset, end, lowest, highest;
};

// A histogram word counts values in its upper bits and adds up their positions within the bin in the lower ones: one
// addition per value. It holds 2^24 values before it must be flushed.
constexpr int kMaxBinBits = 15, kFractionBits = 15, kCountShift = 40;
constexpr uint64_t kCountOne = uint64_t{1} << kCountShift;
constexpr int64_t kHistogramCapacity = (int64_t{1} << (64 - kCountShift)) - 1;

// Sum of squares of 32-bit integers, exact: 2^64 of them fit.
__extension__ typedef unsigned __int128 WideSum;

struct Kernels {
  const char* level;

  bool (*ulq_forward[kElements])(const void* x, void* y, int64_t n,
                                 const UlqForwardParams&);  // true: a value is not finite
  void (*ulq_backward[kElements])(const void* grad, const void* x, void* dx, int64_t n, const UlqBackwardParams&,
                                  UlqSums&);

  bool (*ulq_codes[kElements])(const void* x, uint8_t* y, int64_t n,
                               const UlqForwardParams&);  // codes + 128; same result
  void (*transpose_bytes)(const uint8_t* from, int64_t stride, int rows, uint8_t* to, int64_t width, int64_t n);

  Range (*range[kElements])(const void* w, int64_t n);
  void (*quantize[kElements])(const void* w, void* y, int64_t n, const SymmetricParams&);
  // The same, and the range of as many weights at `next`; there the prefetch distance counts from `next`.
  Range (*quantize_and_range[kElements])(const void* w, void* y, int64_t n, const SymmetricParams&, const void* next);
  // Weights that the mask drops count as zero.
  Range (*masked_range[kElements])(const void* w, const uint8_t* mask, int64_t n);
  void (*masked_quantize[kElements])(const void* w, const uint8_t* mask, void* y, int64_t n, const SymmetricParams&);
  void (*quantize_codes[kElements])(const void* w, int8_t* y, int64_t n, const SymmetricParams&);
  double (*lsq_backward[kElements])(const void* grad, const void* w, int64_t n, const SymmetricParams&);
  double (*sum_squares[kElements])(const void* w, int64_t n);

  // 2:4 along `count` rows of `inner` values.
  void (*mask_plane[kElements])(const void* w, uint8_t* mask, int64_t count, int64_t inner);
  void (*sparsify_plane[kElements])(const void* w, uint8_t* mask, void* y, int64_t count, int64_t inner);
  // The same, and the range of `y`.
  Range (*sparsify_and_range[kElements])(const void* w, uint8_t* mask, void* y, int64_t count, int64_t inner);
  void (*apply_mask[kElements])(const void* w, const uint8_t* mask, void* y, int64_t n);

  Range (*range_with_zero[kElements])(const void* x, int64_t n);
  // Bins of equal width; magnitudes times `scale` must stay below 2^31.
  void (*histogram[kElements])(const void* x, int64_t n, double scale, uint64_t* bins);
  // Bins of equal relative width.
  void (*range_histogram[kElements])(const void* x, int64_t n, uint32_t first_bits, int dropped_bits, int64_t* bins);
  void (*losses[kElements])(const void* x, int64_t n, const Candidate*, int count, double* sums);
  void (*offset_losses[kElements])(const void* x, int64_t n, const Candidate*, int count, double* sums);

  // Adds to 16 sums; true: a value is NaN.
  bool (*shift_errors[kElements])(const void* x, int64_t n, double scale, WideSum* sums);
};

const Kernels& kernels();

}  // namespace amct_ext::cpu
