#include "cpu/loop_table.h"

namespace amct_ext::cpu {

extern const LoopTable loops_baseline;
#ifdef AMCT_X86_LEVELS
extern const LoopTable loops_v3;
extern const LoopTable loops_v4;
extern const LoopTable loops_v4bf16;
#endif

namespace {

const LoopTable& best_loops() {
#ifdef AMCT_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512bf16") ? loops_v4bf16 : loops_v4;
  }
  if (__builtin_cpu_supports("x86-64-v3")) return loops_v3;
#endif
  return loops_baseline;
}

}  // namespace

const LoopTable& loops() {
  static const LoopTable& best = best_loops();
  return best;
}

}  // namespace amct_ext::cpu
