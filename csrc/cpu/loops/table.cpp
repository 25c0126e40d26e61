// The table of all loops for one instruction set: compiled once for each (cmake/simd.cmake), AMCT_LEVEL being its name.
// Nothing here may include a header with inline functions of external linkage: the linker keeps one copy of those for
// the whole library, perhaps one that was compiled for a newer processor.
#include "cpu/loop_table.h"
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

#define AMCT_JOIN_(a, b) a##b
#define AMCT_JOIN(a, b) AMCT_JOIN_(a, b)
#define AMCT_TEXT_(a) #a
#define AMCT_TEXT(a) AMCT_TEXT_(a)
#define AMCT_LOOP(result, name, parameters) .name = {name<float>, name<double>, name<BFloat16>, name<Float16>},
#define AMCT_FLOAT_LOOP(result, name, parameters) .name = name,

namespace amct_ext::cpu {

extern const LoopTable AMCT_JOIN(loops_, AMCT_LEVEL);
const LoopTable AMCT_JOIN(loops_, AMCT_LEVEL) = {
    .level = AMCT_TEXT(AMCT_LEVEL),
    .transpose_bytes = transpose_bytes,
#include "cpu/loops/list.h"
};

}  // namespace amct_ext::cpu
