"""Kernels for other devices: our own NPU adapter, and those of other packages (entry-point group `amct_ext.backends`).

A package offers kernels by naming a function without arguments in its metadata:

    [project.entry-points."amct_ext.backends"]
    npu = "my_package.kernels:register"

It is called once, at the end of `import amct_ext.ops`, when every schema and reference is there, and registers per op:

    def register() -> None:
        torch.library.impl("amct_ext::mask_2to4", "npu")(my_mask)  # or TORCH_LIBRARY_IMPL(amct_ext, PrivateUse1, m)

What it leaves out runs through the references. `AMCT_BACKENDS=0` in the environment leaves all of them out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch

from amct_ext import _library

GROUP = "amct_ext.backends"
logger = logging.getLogger(__name__)


def load() -> None:
    """Register the kernels of all back ends. One that fails is reported by a warning and leaves the references."""
    if os.environ.get("AMCT_BACKENDS", "1") == "0":
        return
    _run("amct_ext's NPU adapter", _library.load_npu)
    for point in sorted(entry_points(group=GROUP), key=lambda found: (found.name, found.value)):
        _run(f"back end '{point.name}' ({point.value}{_source(point)})", partial(_call, point))


def kernels(device: str) -> tuple[str, ...]:
    """The ops that have a kernel of their own for a device type; all others run through their references there.

    Errors: RuntimeError for a device type that torch does not know.

        >>> "ulq_fake_quantize" in kernels("cpu"), kernels("xla")
        (True, ())
    """
    key = torch._C._dispatch_key_for_device(torch.device(device).type)
    names = sorted(s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("amct_ext::"))
    found = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
    return tuple(name.removeprefix("amct_ext::") for name in found)


def reference(op: str) -> Callable[..., Any]:
    """The plain-torch reference of an op, whatever kernels are registered, for kernels that take some cases only.

    It takes the op's arguments by position, all of them, and runs on any device. Errors: RuntimeError where there is
    no such op.

        >>> reference("mask_2to4")(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 1).tolist()
        [[True, False, False, True]]
    """
    kernel = torch.library.get_kernel(f"amct_ext::{op}", "Undefined")  # of no device at all
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)  # which the kernel of a Python function never reads
    return lambda *arguments: kernel.call_boxed(keys, *arguments)


def _call(point: EntryPoint) -> None:
    point.load()()


def _source(point: EntryPoint) -> str:
    return f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""


def _run(what: str, register: Callable[[], Any]) -> None:
    try:
        register()
    except Exception as error:
        logger.warning("%s failed to register (%s: %s); the references serve instead. AMCT_BACKENDS=0 leaves back ends "
                     "out", what, type(error).__name__, error)  # fmt: skip
