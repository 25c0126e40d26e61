// The integer product for one instruction set (cmake/simd.cmake); see table.cpp for what may be included here.
#include "cpu/loops/integer_product.h"

#define AMCT_JOIN_(a, b) a##b
#define AMCT_JOIN(a, b) AMCT_JOIN_(a, b)

#define AMCT_TEXT_(a) #a
#define AMCT_TEXT(a) AMCT_TEXT_(a)

namespace amct_ext::cpu {

extern const ProductKernel AMCT_JOIN(product_, AMCT_LEVEL);
const ProductKernel AMCT_JOIN(product_, AMCT_LEVEL) = {
    .level = AMCT_TEXT(AMCT_LEVEL),
    .tile_blocks = kKernelBlocks,
    .vectors = kVectors,
    .code_shift = kCodeShift,
    .sums = compute_tile,
    .write_rows = write_rows,
    .write_columns = write_columns,
    .split_weights = kSplitWeights,
};

}  // namespace amct_ext::cpu
