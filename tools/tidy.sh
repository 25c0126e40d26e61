#!/usr/bin/env bash
# clang-tidy, with the checks of .clang-tidy, over the C++ sources and tests, and over the CUDA kernels in the form in which
# tests/native/cuda_on_host compiles them for the host. Needs the build folder of an editable install.
#   tools/tidy.sh [regular expression of files; default: all]
# Uses the python that is first on PATH (make sets it to the environment's).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=build/cmake-$(python -c 'import sys; print(sys.implementation.cache_tag)')
torch_root=$(sed -n 's/^AMCT_TORCH_ROOT:PATH=//p' "$build/CMakeCache.txt")
cmake "$build" -DAMCT_TESTS=ON >/dev/null
cmake -S tests/native/cuda_on_host -B build/tidy-cuda -G Ninja -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
  -DAMCT_TORCH_ROOT="$torch_root" >/dev/null

# clang-tidy brings the headers of clang, but not omp.h.
headers=$("${CXX:-c++}" -print-file-name=include)
for folder in "$build" build/tidy-cuda; do
  run-clang-tidy.py -quiet -j "$(nproc)" -p "$folder" "-extra-arg=-idirafter$headers" "${1:-$PWD/(csrc|tests/native)/}"
done
