#!/usr/bin/env bash
# Builds the native code with AddressSanitizer and UndefinedBehaviorSanitizer beside the normal build, and runs tests on it:
#   tools/sanitize.sh [pytest arguments; default: the op tests]
# Uses the python that is first on PATH (make sets it to the environment's).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=build/sanitize
package=$folder/package/amct_ext
torch_root=$(python -c 'import torch; print(torch.__path__[0])')

cmake -S . -B "$folder" -G Ninja -DAMCT_SANITIZE=ON -DAMCT_TORCH_ROOT="$torch_root" \
  -DAMCT_TORCH_VERSION="$(python -c 'import torch; print(torch.__version__)')" -DPython_EXECUTABLE="$(command -v python)" \
  -Dpybind11_DIR="$(python -c 'import pybind11; print(pybind11.get_cmake_dir())')"
cmake --build "$folder"

# The Python part is a copy, so that the sanitized libraries never end up in the sources.
rm -rf "$package" && mkdir -p "$package"
cp -r amct_ext/. "$package"
find "$package" -name '*.so' -delete
cmake --install "$folder" --component python --prefix "$PWD/$package"

# torch.compile starts compilers, which would inherit the preloaded runtime: those tests are left out.
if [ $# -eq 0 ]; then set -- tests/ops -k 'not compile'; fi
# The interpreter is not instrumented, so the runtime has to be loaded first (libstdc++ too, for exceptions to be caught);
# its own leaks are none of ours.
LD_PRELOAD=
for library in libasan libubsan libstdc++; do LD_PRELOAD+="$("${CXX:-g++}" -print-file-name=$library.so):"; done
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$folder/package" PYTHONDONTWRITEBYTECODE=1
# `python -P`: the working folder, with the normal build in it, must not come before PYTHONPATH.
python -P -c 'import amct_ext; print("sanitizer:", amct_ext.build_info()["sanitizer"] or exit("not the sanitized build"))'
python -P -m pytest -p no:cacheprovider "$@"
