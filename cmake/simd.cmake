# The loops of csrc/cpu/loops/table.cpp, compiled once for every instruction set; csrc/cpu/loop_table.cpp chooses at run time.
# All levels give the same bits: no contraction, no reassociation, and reductions over a fixed number of partial sums.
set(AMCT_LEVELS baseline)
set(AMCT_FLAGS_baseline "")
if(AMCT_SIMD AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND AMCT_LEVELS v3 v4 v4bf16)
  set(AMCT_FLAGS_v3 -march=x86-64-v3)
  set(AMCT_FLAGS_v4 -march=x86-64-v4 -mprefer-vector-width=512)
  set(AMCT_FLAGS_v4bf16 ${AMCT_FLAGS_v4} -mavx512bf16)
endif()
foreach(level IN LISTS AMCT_LEVELS)
  add_library(amct_loops_${level} OBJECT csrc/cpu/loops/table.cpp)
  target_compile_definitions(amct_loops_${level} PRIVATE AMCT_LEVEL=${level})
  # GCC takes the undefined registers inside its own AVX-512 headers for ours.
  target_compile_options(amct_loops_${level} PRIVATE ${AMCT_FLAGS_${level}}
                                                     $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  target_include_directories(amct_loops_${level} PRIVATE csrc)
  target_link_libraries(amct_loops_${level} PRIVATE amct_flags)
  target_sources(libamct_ext PRIVATE $<TARGET_OBJECTS:amct_loops_${level}>)
endforeach()
# The integer product has a level of its own: VNNI is no part of v4. What it returns is exact on every level.
set(AMCT_PRODUCT_LEVELS baseline)
# gcc takes the pass-through operands of its own intrinsics for uninitialised.
set(AMCT_FLAGS_vnni -march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512 -Wno-maybe-uninitialized)
if(v4 IN_LIST AMCT_LEVELS)
  list(APPEND AMCT_PRODUCT_LEVELS vnni)
endif()
foreach(level IN LISTS AMCT_PRODUCT_LEVELS)
  add_library(amct_product_${level} OBJECT csrc/cpu/loops/integer_product.cpp)
  target_compile_definitions(amct_product_${level} PRIVATE AMCT_LEVEL=${level})
  target_compile_options(amct_product_${level} PRIVATE ${AMCT_FLAGS_${level}})
  target_include_directories(amct_product_${level} PRIVATE csrc)
  target_link_libraries(amct_product_${level} PRIVATE amct_flags)
  target_sources(libamct_ext PRIVATE $<TARGET_OBJECTS:amct_product_${level}>)
endforeach()
list(JOIN AMCT_LEVELS "," AMCT_LEVELS_TEXT)
target_compile_definitions(libamct_ext PRIVATE
  AMCT_LEVELS="${AMCT_LEVELS_TEXT}" AMCT_VERSION="${AMCT_VERSION}" AMCT_TORCH_VERSION="${AMCT_TORCH_VERSION}"
  $<$<BOOL:${AMCT_SANITIZE}>:AMCT_SANITIZED> $<$<IN_LIST:v3,${AMCT_LEVELS}>:AMCT_X86_LEVELS>)
