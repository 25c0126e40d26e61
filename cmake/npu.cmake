# libamct_ext_npu: the kernels of csrc/npu for Ascend NPUs. Built if torch_npu is installed, loaded if it is imported.
set(AMCT_NPU AUTO CACHE STRING "Build the NPU adapter: AUTO (where torch_npu is found), ON (an error without it), OFF")
set_property(CACHE AMCT_NPU PROPERTY STRINGS AUTO ON OFF)
set(AMCT_TORCH_NPU_ROOT "" CACHE PATH "Folder of the installed torch_npu package")

set(AMCT_TORCH_NPU_INCLUDE "${AMCT_TORCH_NPU_ROOT}/include")
set(AMCT_TORCH_NPU_HEADER "${AMCT_TORCH_NPU_INCLUDE}/third_party/op-plugin/op_plugin/include/npu_cpp_extension.h")
if(AMCT_NPU STREQUAL "AUTO" AND NOT EXISTS "${AMCT_TORCH_NPU_HEADER}")
  return()
elseif(NOT AMCT_NPU)
  return()
elseif(NOT EXISTS "${AMCT_TORCH_NPU_HEADER}")
  message(FATAL_ERROR "AMCT_NPU is ON but AMCT_TORCH_NPU_ROOT, '${AMCT_TORCH_NPU_ROOT}', is not the folder of an "
                      "installed torch_npu package: there is no ${AMCT_TORCH_NPU_HEADER}")
endif()

# torch_npu's headers include Python's and want the version of torch in a macro, as V2R13.
string(REGEX REPLACE "^([0-9]+)\\.([0-9]+).*" "V\\1R\\2" AMCT_TORCH_NPU_BRANCH "${AMCT_TORCH_VERSION}")
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
file(GLOB AMCT_NPU_SOURCES CONFIGURE_DEPENDS csrc/npu/*.cpp)
add_library(libamct_ext_npu SHARED ${AMCT_NPU_SOURCES})
set_target_properties(libamct_ext_npu PROPERTIES
  OUTPUT_NAME amct_ext_npu INSTALL_RPATH "$ORIGIN/../../torch/lib;$ORIGIN/../../torch_npu/lib")
target_compile_definitions(libamct_ext_npu PRIVATE CURRENT_VERSION=${AMCT_TORCH_NPU_BRANCH})
target_include_directories(libamct_ext_npu PRIVATE csrc)
target_include_directories(libamct_ext_npu SYSTEM PRIVATE
  ${AMCT_TORCH_NPU_INCLUDE} ${AMCT_TORCH_NPU_INCLUDE}/third_party/op-plugin
  ${AMCT_TORCH_NPU_INCLUDE}/third_party/acl/inc ${Python_INCLUDE_DIRS})
target_link_directories(libamct_ext_npu PRIVATE ${AMCT_TORCH_NPU_ROOT}/lib)
target_link_libraries(libamct_ext_npu PRIVATE amct_flags amct_torch torch_npu)
# Our own undefined symbols are errors; those of torch_npu are not, for its driver may be missing on this machine.
target_link_options(libamct_ext_npu PRIVATE -Wl,--no-undefined -Wl,--allow-shlib-undefined)
install(TARGETS libamct_ext_npu LIBRARY DESTINATION lib COMPONENT python)
target_compile_definitions(libamct_ext PRIVATE AMCT_NPU)  # for the build information
