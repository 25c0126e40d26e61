// How this library was built and what it chose at run time.
#pragma once

#include <string>

namespace amct_ext {

struct BuildInfo {
  std::string version;
  std::string torch;
  std::string compiler;
  std::string simd_levels;  // comma separated
  std::string simd;         // the level in use
  bool cuda;
  bool npu;
  std::string sanitizer;       // empty without one
  std::string product_levels;  // kernels of the integer product, comma separated
  std::string product;         // the one in use
};

__attribute__((visibility("default"))) BuildInfo build_info();

}  // namespace amct_ext
