"""A stand-in accelerator for tests: a PrivateUse1 device in host memory, built from `native/standin_device.cpp`.

A process has one PrivateUse1 device for good, so only child processes call `load`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
NAME = "standin"


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library(source: Path, *options: str) -> Path:
    """Compile one source to a shared library, once per content, torch and options; safe against parallel tests."""
    package = Path(torch.__file__).parent
    include = package / "include"
    headers = [h for o in options if o.startswith("-I") for h in sorted(Path(o.removeprefix("-I")).rglob("*.h"))]
    content = "\n".join([torch.__version__, *options, *(file.read_text() for file in (source, *headers))])
    target = ROOT / "build" / "tests" / f"{source.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        launcher = [found] if (found := shutil.which("ccache")) else []
        command = [
            *launcher, str(compiler()), "-std=c++20",
            "-O0", "-fPIC", "-shared", "-ffp-contract=off",
            f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *options, str(source), "-o", str(partial),
            f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
        partial.replace(target)
    return target


def load(name: str = NAME) -> torch.device:
    """Make the stand-in this process's PrivateUse1 device, under `name`."""
    torch.utils.rename_privateuse1_backend(name)
    torch._register_device_module(name, _device_module(name))
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.ops.load_library(str(library(ROOT / "tests" / "native" / "standin_device.cpp")))
    return torch.device(name, 0)


def host_syncs() -> list[str]:
    """The host syncs (copies, reads of a value) since the last call."""
    return torch.ops.standin.take_host_syncs()


def _device_module(name: str) -> types.ModuleType:
    """`torch.<name>`, as torch expects one from a vendor. The random numbers are those of the CPU."""
    module = types.ModuleType(f"torch.{name}")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        manual_seed_all=torch.default_generator.manual_seed,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        _is_in_bad_fork=lambda: False,
    )
    return module
