// `_C`: what no op schema carries: the build information, idle memory, and whether memory was written to.
#include <pybind11/pybind11.h>

#include <sstream>

#include "common/build_info.h"
#include "cpu/fingerprint.h"
#include "cpu/result_pool.h"

namespace py = pybind11;

namespace {

py::tuple split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.append(part);
  return py::tuple(parts);
}

py::dict build_info() {
  const amct_ext::BuildInfo info = amct_ext::build_info();
  py::dict result;
  result["version"] = info.version;
  result["torch"] = info.torch;
  result["compiler"] = info.compiler;
  result["simd_levels"] = split(info.simd_levels);
  result["simd"] = info.simd;
  result["integer_product_levels"] = split(info.product_levels);
  result["integer_product"] = info.product;
  result["cuda"] = info.cuda;
  result["npu"] = info.npu;
  result["sanitizer"] = info.sanitizer.empty() ? py::object(py::none()) : py::object(py::str(info.sanitizer));
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the compiled part of amct_ext was built, its idle memory, and fingerprints of memory.";
  m.def("build_info", &build_info);
  m.def("release_memory", &amct_ext::cpu::release_memory);
  m.def("fingerprint", [](uintptr_t address, size_t bytes, size_t pieces) {
    return amct_ext::cpu::fingerprint(reinterpret_cast<const void*>(address), bytes, pieces);
  });
}
