// Compiled once per instruction set (cmake/simd.cmake); AMCT_LEVEL is its name.
#include "cpu/kernels.h"

#define AMCT_JOIN_(a, b) a##b
#define AMCT_JOIN(a, b) AMCT_JOIN_(a, b)
#define AMCT_TEXT_(a) #a
#define AMCT_TEXT(a) AMCT_TEXT_(a)

namespace amct_ext::cpu {

extern const Kernels AMCT_JOIN(kernels_, AMCT_LEVEL);
const Kernels AMCT_JOIN(kernels_, AMCT_LEVEL) = {AMCT_TEXT(AMCT_LEVEL)};

}  // namespace amct_ext::cpu
