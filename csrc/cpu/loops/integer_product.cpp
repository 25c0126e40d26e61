// The integer product for one instruction set (cmake/simd.cmake); see table.cpp for what may be included here.
#include "cpu/loops/integer_product.h"

#define AMCT_JOIN_(a, b) a##b
#define AMCT_JOIN(a, b) AMCT_JOIN_(a, b)

namespace amct_ext::cpu {

extern const ProductKernel AMCT_JOIN(product_, AMCT_LEVEL);
const ProductKernel AMCT_JOIN(product_, AMCT_LEVEL) = {compute_tile, write_rows, write_columns};

}  // namespace amct_ext::cpu
