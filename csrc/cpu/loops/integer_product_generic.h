// The vector parts of the integer product without intrinsics: compilers vectorise the plain loops.
#pragma once

#include "common/quant_math.h"
#include "cpu/integer_product.h"

namespace amct_ext::cpu {
namespace {

struct Sums {
  int32_t lane[kBlockChannels];
};
struct Quads {
  const int8_t* w;
};
struct Inputs4 {
  const uint8_t* x;
};
constexpr int kLanes = kBlockChannels, kVectors = 1, kKernelBlocks = 1, kCodeShift = 0;
constexpr bool kSplits = false;
constexpr decltype(ProductKernel::split_weights) kSplitWeights = nullptr;
AMCT_INLINE Sums zero_sums() { return {}; }
AMCT_INLINE Quads load_quads(const int8_t* w) { return {w}; }
AMCT_INLINE Inputs4 broadcast4(const uint8_t* x) { return {x}; }
AMCT_INLINE Sums add_dot4(Sums sums, Inputs4 x, Quads w) {
  for (int c = 0; c < kBlockChannels; ++c) {
    int32_t sum = 0;
    for (int k = 0; k < 4; ++k) sum += int32_t{x.x[k]} * int32_t{w.w[4 * c + k]};
    sums.lane[c] += sum;
  }
  return sums;
}

// All rows and columns are left to the caller.
#define AMCT_OWN_WRITE_ROWS
AMCT_INLINE int write_rows_vec(const Epilogue&, const int32_t*, int64_t, float*, int64_t) { return 0; }
AMCT_INLINE int64_t write_columns_vec(const Epilogue&, const int32_t*, int, int64_t, float*, int64_t) { return 0; }

}  // namespace
}  // namespace amct_ext::cpu
