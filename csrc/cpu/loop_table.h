// The compiled loops: raw pointers, one thread, no tensors. Each instruction set has one table of function pointers
// (loops/table.cpp); `loops()` is the best one for this processor. Arrays run over the element types in the order of
// `Element`.
#pragma once

#include "cpu/loop_params.h"

namespace amct_ext::cpu {

// The members are those of loops/list.h.
struct LoopTable {
  const char* level;
  void (*transpose_bytes)(const uint8_t* from, int64_t stride, int rows, uint8_t* to, int64_t width, int64_t n);
#define AMCT_LOOP(result, name, parameters) result(*name[kElements]) parameters;
#define AMCT_FLOAT_LOOP(result, name, parameters) result(*name) parameters;
#include "cpu/loops/list.h"
#undef AMCT_LOOP
#undef AMCT_FLOAT_LOOP
};

const LoopTable& loops();

}  // namespace amct_ext::cpu
