// Every loop, and the headers that they are in. Included three times: with AMCT_LOOP_HEADERS for the headers; by
// cpu/loop_table.h, which makes the list pointers, and by table.cpp, which fills them with name<T> or name. Those two
// define AMCT_LOOP(result, name, parameters) for loops that are compiled for each element type, and AMCT_FLOAT_LOOP for
// those of float32 alone. No include guard.
#ifdef AMCT_LOOP_HEADERS
#include "cpu/loops/activation_batch_norm.h"
#include "cpu/loops/activation_batch_norm_backward.h"
#include "cpu/loops/activation_ulq.h"
#include "cpu/loops/calibration_search.h"
#include "cpu/loops/calibration_shift.h"
#include "cpu/loops/integer_codes.h"
#include "cpu/loops/sparsity_mask.h"
#include "cpu/loops/weight_lsq.h"
#include "cpu/loops/weight_quantize.h"
#include "cpu/loops/weight_range.h"
#include "cpu/loops/weight_scale_search.h"
#else

AMCT_LOOP(bool, ulq_forward, (const void* x, void* y, int64_t n, const UlqForwardParams&))
AMCT_LOOP(void, ulq_backward,
          (const void* grad, const void* x, void* dx, int64_t n, const UlqBackwardParams&, UlqSums&))
// The sums alone.
AMCT_FLOAT_LOOP(void, ulq_clip_sums, (const float* grad, const float* x, int64_t n, const UlqBackwardParams&, UlqSums&))
// Through a quantiser and the ReLU before it, whose result is y; an addend may be null.
AMCT_FLOAT_LOOP(void, ulq_relu_backward,
                (const float* grad, const float* y, const float* addend, float* dx, int64_t n,
                 const UlqBackwardParams&))
// Codes + 128; same result.
AMCT_LOOP(bool, ulq_codes, (const void* x, uint8_t* y, int64_t n, const UlqForwardParams&))

AMCT_LOOP(Range, range, (const void* w, int64_t n))
AMCT_LOOP(void, quantize, (const void* w, void* y, int64_t n, const SymmetricParams&))
// The same, and the range of as many weights at `next`; there the prefetch distance counts from `next`.
AMCT_LOOP(Range, quantize_and_range, (const void* w, void* y, int64_t n, const SymmetricParams&, const void* next))
// Weights that the mask drops count as zero.
AMCT_LOOP(Range, masked_range, (const void* w, const uint8_t* mask, int64_t n))
AMCT_LOOP(void, masked_quantize, (const void* w, const uint8_t* mask, void* y, int64_t n, const SymmetricParams&))
AMCT_LOOP(void, quantize_codes, (const void* w, int8_t* y, int64_t n, const SymmetricParams&))
AMCT_LOOP(double, lsq_backward, (const void* grad, const void* w, int64_t n, const SymmetricParams&))
AMCT_LOOP(double, sum_squares, (const void* w, int64_t n))
// Adds the sums of squares of the weights and of what quantising leaves of them.
AMCT_LOOP(void, squares_left, (const void* w, int64_t n, const SymmetricParams&, double* sums))
// Adds, for each of the kScaleFactors scales that are tried, the sums of weight times code and of code squared. A mask
// may be null.
AMCT_LOOP(void, scale_fits, (const void* w, const uint8_t* mask, int64_t n, const ScaleSearchParams&, double* sums))

// 2:4 along `count` rows of `inner` values.
AMCT_LOOP(void, mask_plane, (const void* w, uint8_t* mask, int64_t count, int64_t inner))
AMCT_LOOP(void, sparsify_plane, (const void* w, uint8_t* mask, void* y, int64_t count, int64_t inner))
// The same, and the range of `y`.
AMCT_LOOP(Range, sparsify_and_range, (const void* w, uint8_t* mask, void* y, int64_t count, int64_t inner))
AMCT_LOOP(void, apply_mask, (const void* w, const uint8_t* mask, void* y, int64_t n))
// The gradient, and `decay` times the weights that the mask drops.
AMCT_LOOP(void, sr_ste_backward,
          (const void* grad, const void* w, const uint8_t* mask, void* d_w, int64_t n, double decay))

AMCT_LOOP(Range, range_with_zero, (const void* x, int64_t n))
// Bins of equal width; magnitudes times `scale` must stay below 2^31.
AMCT_LOOP(void, histogram, (const void* x, int64_t n, double scale, uint64_t* bins))
// Bins of equal relative width.
AMCT_LOOP(void, range_histogram, (const void* x, int64_t n, uint32_t first_bits, int dropped_bits, int64_t* bins))
AMCT_LOOP(void, signed_range_histogram,
          (const void* x, int64_t n, uint32_t first_bits, int dropped_bits, int64_t* bins, int64_t negative))
AMCT_LOOP(void, losses, (const void* x, int64_t n, const Candidate*, int count, double* sums))
AMCT_LOOP(void, offset_losses, (const void* x, int64_t n, const Candidate*, int count, double* sums))

// Adds to 16 sums; true: a value is NaN.
AMCT_LOOP(bool, shift_errors, (const void* x, int64_t n, double scale, WideSum* sums))

AMCT_FLOAT_LOOP(double, sum_values, (const float* x, int64_t n))
AMCT_FLOAT_LOOP(double, sum_squared_distances, (const float* x, int64_t n, float mean))
// BatchNorm, activation function and ULQ. True: a value is not finite.
AMCT_FLOAT_LOOP(bool, batch_norm_ulq_plane,
                (const float* x, float* y, int64_t n, float factor, float shift, const ActivationParams&,
                 const UlqForwardParams&))
AMCT_FLOAT_LOOP(bool, batch_norm_ulq_rows,
                (const float* x, float* y, int64_t rows, int64_t channels, const float* factor, const float* shift,
                 const ActivationParams&, const UlqForwardParams&))
// BatchNorm and an activation function or, where an addend is given, an addition.
AMCT_FLOAT_LOOP(void, batch_norm_plane,
                (const float* x, const float* addend, float* y, int64_t n, float factor, float shift,
                 const ActivationParams&))
AMCT_FLOAT_LOOP(void, batch_norm_rows,
                (const float* x, const float* addend, float* y, int64_t rows, int64_t channels, const float* factor,
                 const float* shift, const ActivationParams&))
// Sums over a channel for the gradient of either, then that gradient. The quantiser may be null.
AMCT_FLOAT_LOOP(void, batch_norm_sums_plane,
                (const float* grad, const float* x, int64_t n, const BatchNormChannel&, const ActivationParams&,
                 const UlqBackwardParams*, BatchNormSums&, UlqSums&))
AMCT_FLOAT_LOOP(void, batch_norm_sums_rows,
                (const float* grad, const float* x, int64_t rows, int64_t channels, const BatchNormRows&,
                 const ActivationParams&, const UlqBackwardParams*, double* gradient, double* product, UlqSums&))
AMCT_FLOAT_LOOP(void, batch_norm_dx_plane,
                (const float* grad, const float* x, float* dx, int64_t n, const BatchNormChannel&,
                 const ActivationParams&, const UlqBackwardParams*))
AMCT_FLOAT_LOOP(void, batch_norm_dx_rows,
                (const float* grad, const float* x, float* dx, int64_t rows, int64_t channels, const BatchNormRows&,
                 const ActivationParams&, const UlqBackwardParams*))

#endif
