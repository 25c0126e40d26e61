// The table of all loops for one instruction set: compiled once for each (cmake/simd.cmake), AMCT_LEVEL being its name.
// No header of a loop may include a header with inline functions of external linkage: the linker keeps one copy of
// those for the whole library, perhaps one that was compiled for a newer processor.
#include "cpu/loop_table.h"
#define AMCT_LOOP_HEADERS
#include "cpu/loops/list.h"
#undef AMCT_LOOP_HEADERS

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
