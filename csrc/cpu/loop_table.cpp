#include "cpu/loop_table.h"

#include <vector>

#include "cpu/level_choice.h"

namespace amct_ext::cpu {

extern const LoopTable loops_baseline;
#ifdef AMCT_X86_LEVELS
extern const LoopTable loops_v3;
extern const LoopTable loops_v4;
extern const LoopTable loops_v4bf16;
#endif

namespace {

std::vector<const LoopTable*> usable_loops() {
  std::vector<const LoopTable*> usable{&loops_baseline};
#ifdef AMCT_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) usable.push_back(&loops_v3);
  if (__builtin_cpu_supports("x86-64-v4")) {
    usable.push_back(&loops_v4);
    if (__builtin_cpu_supports("avx512bf16")) usable.push_back(&loops_v4bf16);
  }
#endif
  return usable;
}

}  // namespace

const LoopTable& loops() {
  static const LoopTable& chosen = choose_level<LoopTable>("AMCT_SIMD_LEVEL", usable_loops());
  return chosen;
}

}  // namespace amct_ext::cpu
