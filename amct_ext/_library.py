"""Loads the compiled ops and says how they were built.

`lib/libamct_ext.so` carries every schema, the CPU kernels and the autograd rules, and no Python; loading it registers
`torch.ops.amct_ext`. `_C` (pybind11) answers what a schema cannot: how the library was built.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

_PATH = Path(__file__).resolve().parent / "lib" / "libamct_ext.so"


def load() -> None:
    """Load the op library once; a second call finds it loaded."""
    if not _PATH.is_file():
        raise ImportError(
            f"amct_ext: the compiled ops are missing at {_PATH}; "
            "build them with `pip install --no-build-isolation -e .` in the source folder"
        )
    try:
        torch.ops.load_library(str(_PATH))
    except OSError as error:
        raise ImportError(
            f"amct_ext: {_PATH.name} does not load with torch {torch.__version__} ({error}); "
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
    in), `simd` (the one in use), `cuda` and `npu` (whether kernels for them are compiled in), `sanitizer`.

        >>> sorted(build_info())
        ['compiler', 'cuda', 'npu', 'sanitizer', 'simd', 'simd_levels', 'torch', 'version']
    """
    from amct_ext import _C

    info: dict[str, Any] = dict(_C.build_info())
    return info
