#!/usr/bin/env bash
# Runs op tests on the card under compute-sanitizer's memcheck, racecheck and initcheck:
#   tools/sanitize_cuda.sh [pytest arguments; default: the op tests, on the card]
# Uses the python that is first on PATH (make sets it to the environment's).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer is not on PATH (it comes with the CUDA toolkit)'; exit 1; }
python -c 'import torch; torch.cuda.is_available() or exit("no CUDA card that torch can use")'
# torch.compile starts compilers of its own, and captured graphs are what test_cuda.py looks at: neither belongs here.
if [ $# -eq 0 ]; then set -- tests/ops -k 'cuda and not compile'; fi
# Every allocation of its own, so that an access beyond a tensor is one beyond its allocation.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONDONTWRITEBYTECODE=1
for tool in memcheck racecheck initcheck; do
  echo "== $tool"
  # Kernels of other libraries are not ours to judge.
  compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=amct_ext \
    --target-processes application-only python -m pytest -p no:cacheprovider -q "$@"
done
