#include "common/build_info.h"

#include "cpu/integer_product_level.h"
#include "cpu/loop_table.h"

namespace amct_ext {

BuildInfo build_info() {
  BuildInfo info;
  info.version = AMCT_VERSION;
  info.torch = AMCT_TORCH_VERSION;
#if defined(__clang__)
  info.compiler = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info.compiler = std::string("gcc ") + __VERSION__;
#else
  info.compiler = "unknown";
#endif
  info.simd_levels = AMCT_LEVELS;
  info.simd = cpu::loops().level;
  info.product_levels = AMCT_PRODUCT_LEVELS;
  info.product = cpu::product_kernel().level;
#ifdef AMCT_CUDA
  info.cuda = true;
#else
  info.cuda = false;
#endif
#ifdef AMCT_NPU
  info.npu = true;
#else
  info.npu = false;
#endif
#ifdef AMCT_SANITIZED
  info.sanitizer = "address,undefined";
#endif
  return info;
}

}  // namespace amct_ext
