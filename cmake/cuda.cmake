# libamct_ext_cuda: the kernels of csrc/cuda, in a library of its own. Python loads it after libamct_ext if torch was built
# with CUDA. AMCT_CUDA=AUTO builds it if both nvcc and a torch with CUDA are found, and skips it silently otherwise.
set(AMCT_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE AMCT_CUDA PROPERTY STRINGS AUTO ON OFF)
set(AMCT_CUDA_ARCHS "" CACHE STRING "Compute capabilities to compile for, e.g. 80;90 (default: the GPUs of this machine)")
option(AMCT_CUDA_GATE "Compile the CUDA sources with warnings as errors, whatever torch is installed; link nothing" OFF)

set(AMCT_HAS_CUDA OFF)
if(AMCT_CUDA OR AMCT_CUDA_GATE)
  include(CheckLanguage)
  if(AMCT_CUDA STREQUAL "AUTO" AND NOT AMCT_CUDA_GATE AND NOT EXISTS "${AMCT_TORCH_ROOT}/lib/libc10_cuda.so")
    # a torch without CUDA
  else()
    find_program(AMCT_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    if(AMCT_NVCC)
      set(AMCT_HAS_CUDA ON)
    elseif(NOT AMCT_CUDA STREQUAL "AUTO" OR AMCT_CUDA_GATE)
      message(FATAL_ERROR "AMCT_CUDA=ON, but nvcc was found neither on PATH nor under CUDA_HOME")
    endif()
  endif()
endif()
if(NOT AMCT_HAS_CUDA)
  return()
endif()

set(CMAKE_CUDA_COMPILER ${AMCT_NVCC})
set(CMAKE_CUDA_ARCHITECTURES ${AMCT_CUDA_ARCHS})
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES native)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
# The shared runtime, which torch has loaded already.
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
enable_language(CUDA)

file(GLOB AMCT_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
add_library(amct_cuda_objects OBJECT ${AMCT_CUDA_SOURCES})
target_include_directories(amct_cuda_objects PRIVATE csrc)
target_include_directories(amct_cuda_objects SYSTEM PRIVATE ${AMCT_TORCH_ROOT}/include
                                                            ${AMCT_TORCH_ROOT}/include/torch/csrc/api/include)
# No contraction into fused multiply-adds, as on the CPU: results are compared bit for bit.
target_compile_options(amct_cuda_objects PRIVATE --fmad=false "SHELL:-Xcompiler=-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas")
if(NOT EXISTS "${AMCT_TORCH_ROOT}/include/c10/cuda/impl/cuda_cmake_macros.h")
  # Missing from a CPU build of torch; it only says how c10 was linked.
  target_compile_definitions(amct_cuda_objects PRIVATE C10_CUDA_NO_CMAKE_CONFIGURE_FILE)
endif()
if(AMCT_CUDA_GATE)
  target_compile_options(amct_cuda_objects PRIVATE "SHELL:-Werror all-warnings" "SHELL:-Xcompiler=-Werror")
  return()
endif()

add_library(libamct_ext_cuda SHARED $<TARGET_OBJECTS:amct_cuda_objects>)
set_target_properties(libamct_ext_cuda PROPERTIES OUTPUT_NAME amct_ext_cuda LINKER_LANGUAGE CXX
                                                  INSTALL_RPATH "$ORIGIN/../../torch/lib")
find_package(CUDAToolkit REQUIRED)
target_link_libraries(libamct_ext_cuda PRIVATE amct_torch c10_cuda CUDA::cudart)
target_compile_definitions(libamct_ext PRIVATE AMCT_CUDA)
if(AMCT_PYTHON)
  install(TARGETS libamct_ext_cuda LIBRARY DESTINATION lib COMPONENT python)
endif()
