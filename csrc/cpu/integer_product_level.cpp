#include "cpu/integer_product_level.h"

#include "cpu/level_choice.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace amct_ext::cpu {

// One for each level of cmake/simd.cmake.
extern const ProductKernel product_baseline, product_avx2, product_avxvnni, product_avx512, product_avx512vnni,
    product_dotprod, product_i8mm;

std::vector<const ProductKernel*> usable_product_kernels() {
  std::vector<const ProductKernel*> usable{&product_baseline};
#if defined(AMCT_PRODUCT_AVX2)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("x86-64-v3"), avx512 = __builtin_cpu_supports("x86-64-v4");
  if (avx2) usable.push_back(&product_avx2);
  if (avx512) usable.push_back(&product_avx512);
#if defined(AMCT_PRODUCT_AVXVNNI)
  if (avx2 && __builtin_cpu_supports("avxvnni")) usable.push_back(&product_avxvnni);
#endif
  if (avx512 && __builtin_cpu_supports("avx512vnni")) usable.push_back(&product_avx512vnni);
#endif
#if defined(AMCT_PRODUCT_DOTPROD) && defined(__linux__)
  constexpr unsigned long kDotProduct = 1UL << 20, kInt8Matrices = 1UL << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  if ((getauxval(AT_HWCAP) & kDotProduct) != 0) {
    usable.push_back(&product_dotprod);
#if defined(AMCT_PRODUCT_I8MM)
    if ((getauxval(AT_HWCAP2) & kInt8Matrices) != 0) usable.push_back(&product_i8mm);
#endif
  }
#endif
  return usable;
}

const ProductKernel& product_kernel() {
  static const ProductKernel& chosen = choose_level<ProductKernel>("AMCT_PRODUCT_LEVEL", usable_product_kernels());
  return chosen;
}

}  // namespace amct_ext::cpu
