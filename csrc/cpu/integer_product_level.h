// Which kernels of the integer product this build has, and which one is in use.
#pragma once

#include <vector>

#include "cpu/integer_product.h"

namespace amct_ext::cpu {

// Those that this processor can run, from the simplest to the best.
std::vector<const ProductKernel*> usable_product_kernels();

// The best of them, or the one that the environment variable AMCT_PRODUCT_LEVEL names, chosen on first use. Errors:
// std::invalid_argument where that one cannot run here.
const ProductKernel& product_kernel();

}  // namespace amct_ext::cpu
