// The table of all loops for one instruction set: compiled once for each (cmake/simd.cmake), AMCT_LEVEL being its name.
// Nothing here may include a header with inline functions of external linkage: the linker keeps one copy of those for
// the whole library, perhaps one that was compiled for a newer processor.
#include "cpu/dispatch.h"
#include "cpu/loops/activation_ulq.h"
#include "cpu/loops/calibration_search.h"
#include "cpu/loops/calibration_shift.h"
#include "cpu/loops/integer_codes.h"
#include "cpu/loops/sparsity_mask.h"
#include "cpu/loops/weight_lsq.h"
#include "cpu/loops/weight_quantize.h"
#include "cpu/loops/weight_range.h"

#define AMCT_JOIN_(a, b) a##b
#define AMCT_JOIN(a, b) AMCT_JOIN_(a, b)
#define AMCT_TEXT_(a) #a
#define AMCT_TEXT(a) AMCT_TEXT_(a)
#define AMCT_EACH(loop) {loop<float>, loop<double>, loop<BFloat16>, loop<Float16>}

namespace amct_ext::cpu {

extern const Kernels AMCT_JOIN(kernels_, AMCT_LEVEL);
const Kernels AMCT_JOIN(kernels_, AMCT_LEVEL) = {
    .level = AMCT_TEXT(AMCT_LEVEL),
    .ulq_forward = AMCT_EACH(ulq_forward),
    .ulq_backward = AMCT_EACH(ulq_backward),
    .ulq_codes = AMCT_EACH(ulq_codes),
    .transpose_bytes = transpose_bytes,
    .range = AMCT_EACH(range),
    .quantize = AMCT_EACH(quantize),
    .quantize_and_range = AMCT_EACH(quantize_and_range),
    .masked_range = AMCT_EACH(masked_range),
    .masked_quantize = AMCT_EACH(masked_quantize),
    .quantize_codes = AMCT_EACH(quantize_codes),
    .lsq_backward = AMCT_EACH(lsq_backward),
    .sum_squares = AMCT_EACH(sum_squares),
    .mask_plane = AMCT_EACH(mask_plane),
    .sparsify_plane = AMCT_EACH(sparsify_plane),
    .sparsify_and_range = AMCT_EACH(sparsify_and_range),
    .apply_mask = AMCT_EACH(apply_mask),
    .range_with_zero = AMCT_EACH(range_with_zero),
    .histogram = AMCT_EACH(histogram),
    .range_histogram = AMCT_EACH(range_histogram),
    .losses = AMCT_EACH(losses),
    .offset_losses = AMCT_EACH(offset_losses),
    .shift_errors = AMCT_EACH(shift_errors),
};

}  // namespace amct_ext::cpu
