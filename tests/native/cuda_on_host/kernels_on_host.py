"""A pytest plugin that replaces the CPU kernels by those of csrc/cuda, compiled for the host.

AMCT_ON_HOST names the library that tests/native/cuda_on_host/CMakeLists.txt builds.
"""

from __future__ import annotations

import os

import torch
from support.ops import arguments as op_arguments
from support.ops import samples as op_samples


def pytest_configure() -> None:
    torch.ops.load_library(os.environ["AMCT_ON_HOST"])
    missing = [name for name in op_arguments.WITH_CUDA_KERNEL if not served(name)]
    assert not missing, f"not served by csrc/cuda: {missing}"
    # Fibers are slow. 4099 elements already take several blocks and a remainder.
    op_samples.SHAPES = tuple((4099,) if shape == (65537,) else shape for shape in op_samples.SHAPES)


def served(name: str) -> bool:
    """Whether a kernel of csrc/cuda is what the dispatcher calls for CPU tensors."""
    table = torch._C._dispatch_dump_table(f"amct_ext::{name}")
    return any(line.startswith("CPU:") and "/csrc/cuda/" in line for line in table.splitlines())
