// Calibration: the search for an activation's range, on data or on a histogram of it, and for a layer's shift.
// Conventions are in ops.h. None of these ops has a gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "api.h"  // beside this file, so that installed headers need no include folder of their own

namespace amct_ext {

using at::Tensor;

// The range of x (floating, at least one value) with the smallest quantisation error out of 61, from 0.70 to 1.30 of
// its 0.999999 percentile. with_offset keeps the lower end and searches the upper one; else the range is symmetric.
// Returns {scale, offset, clip_max, clip_min}, float32 scalars, for float64 data float64; NaN where x is not finite.
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor> search_clip_range(const Tensor& x, int64_t num_bits = 8,
                                                                      bool with_offset = false);

// Adds x (floating; float64 is rounded to float32) to a histogram that starts as zeros. Written to:
// histogram, int64 (156673, 2), counts of magnitudes and sums of the bits that a bin leaves open, or (2, 156673, 2),
// the same for values not below zero and then for those below;
// extremes, float32 (2, k), the k largest values and the k largest negated ones.
AMCT_API void range_histogram_(const Tensor& x, const Tensor& histogram, const Tensor& extremes);

// The symmetric range of search_clip_range from what range_histogram_ made.
// Returns {scale, offset, clip_max, clip_min}, float32 scalars, and excess, a float64 scalar: by how much the mean
// squared error of this range can exceed the smallest of all 61.
AMCT_API std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> search_clip_range_histogram(const Tensor& histogram,
                                                                                        const Tensor& extremes,
                                                                                        int64_t num_bits = 8);

// Clips of a range that contains zero, from a signed histogram: those of least mean absolute (or squared)
// error. The range reaches as far on either side, but never beyond the data. fixed_min: the lower end is 0.
// Returns {clip_max, clip_min}, float32 scalars; NaN where values were not finite.
AMCT_API std::tuple<Tensor, Tensor> search_clip_range_wide(const Tensor& histogram, const Tensor& extremes,
                                                           int64_t num_bits = 8, bool fixed_min = false,
                                                           bool squared = false);

// The same: the clips within which `percentile` % of the values lie.
AMCT_API std::tuple<Tensor, Tensor> percentile_clip_range(const Tensor& histogram, const Tensor& extremes,
                                                          double percentile = 99.9, int64_t num_bits = 8,
                                                          bool fixed_min = false);

// Adds the squared errors that the shifts 1 to 16 make on x (floating), the output of a quantised layer, to errors:
// float64 (channels, 16), or (1, 16) for one shift of the whole layer. deq_scale: one value or one per channel.
AMCT_API void shift_error_(const Tensor& x, const Tensor& deq_scale, const Tensor& errors, int64_t channel_axis = 1);

// The shift with the smallest error of each row of errors, int32 (channels,), 1 to 16; the smaller one of equals.
AMCT_API Tensor best_shift(const Tensor& errors);

}  // namespace amct_ext
