"""Loads the compiled ops and says how they were built.

`lib/libamct_ext.so` carries every schema, the CPU kernels and the autograd rules, and no Python; loading it registers
`torch.ops.amct_ext`. `lib/libamct_ext_cuda.so`, where it was built, adds the CUDA kernels and is loaded where torch has
CUDA; it registers kernels and touches no GPU. `_C` (pybind11) has what no schema carries: how the library was built,
and the idle memory of its kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

_PATH = Path(__file__).resolve().parent / "lib" / "libamct_ext.so"
_CUDA_PATH = _PATH.with_name("libamct_ext_cuda.so")


def load() -> None:
    """Load the op library, and the CUDA kernels where both they and CUDA are there; a second call finds them loaded."""
    if not _PATH.is_file():
        raise ImportError(
            f"amct_ext: the compiled ops are missing at {_PATH}; "
            "build them with `pip install --no-build-isolation -e .` in the source folder"
        )
    _load(_PATH)
    if torch.backends.cuda.is_built() and _CUDA_PATH.is_file():
        _load(_CUDA_PATH)


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"amct_ext: {path.name} does not load with torch {torch.__version__} ({error}); "
            "it must be built against the torch that is installed: `pip install --no-build-isolation -e .`"
        ) from error


def load_npu() -> None:
    """Load the NPU adapter where it was built and torch_npu is in use. Errors: OSError where it does not load."""
    path = _PATH.with_name("libamct_ext_npu.so")
    if path.is_file() and "torch_npu" in sys.modules:
        torch.ops.load_library(str(path))


def build_info() -> dict[str, Any]:
    """How the compiled part was built and what it chose on this machine.

    Keys: `version`, `torch` (version it was compiled against), `compiler`, `simd_levels` (instruction sets compiled
    in), `simd` (the one in use), `integer_product_levels` and `integer_product` (the same for the products of 8-bit
    codes), `cuda` and `npu` (whether kernels for them are compiled in), `sanitizer`.

        >>> print(*sorted(build_info()))
        compiler cuda integer_product integer_product_levels npu sanitizer simd simd_levels torch version
    """
    from amct_ext import _C

    info: dict[str, Any] = dict(_C.build_info())
    return info


def release_memory() -> int:
    """Give the idle memory of the CPU kernels back to the system; the number of bytes.

    Results of 256 KiB to 256 MiB leave their memory to later ones: at most two blocks lie idle for activations, and
    256 MiB in all for weights and masks. Results that are in use keep theirs. For a process that is done with training.

        >>> release_memory() >= 0
        True
    """
    from amct_ext import _C

    return int(_C.release_memory())
