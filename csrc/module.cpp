// `_C`: what no op schema carries, the build information and idle memory.
#include <pybind11/pybind11.h>

#include <sstream>

#include "build_info.h"
#include "cpu/reuse.h"

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
  result["cuda"] = info.cuda;
  result["npu"] = info.npu;
  result["sanitizer"] = info.sanitizer.empty() ? py::object(py::none()) : py::object(py::str(info.sanitizer));
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the compiled part of amct_ext was built, and its idle memory.";
  m.def("build_info", &build_info);
  m.def("release_memory", &amct_ext::cpu::release_memory);
}
