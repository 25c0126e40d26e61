// The table of compiled loops. Each instruction set has one; the best one for this machine is chosen on first use.
#pragma once

#include <cstdint>

namespace amct_ext::cpu {

struct Kernels {
  const char* level;
};

const Kernels& kernels();

}  // namespace amct_ext::cpu
