#include "cpu/dispatch.h"

namespace amct_ext::cpu {

extern const Kernels kernels_baseline;
#ifdef AMCT_X86_LEVELS
extern const Kernels kernels_v3;
extern const Kernels kernels_v4;
extern const Kernels kernels_v4bf16;
#endif

namespace {

const Kernels& best_kernels() {
#ifdef AMCT_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512bf16") ? kernels_v4bf16 : kernels_v4;
  }
  if (__builtin_cpu_supports("x86-64-v3")) return kernels_v3;
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& best = best_kernels();
  return best;
}

}  // namespace amct_ext::cpu
