"""Builds the native part: runs CMake (the only description of the build) and places what it installs into the package.

Metadata and dependencies stand in pyproject.toml. Settings come through the environment:
    AMCT_CMAKE_ARGS   more arguments for CMake, e.g. "-DAMCT_SIMD=OFF -DAMCT_SANITIZE=ON" or
                      "-DAMCT_CUDA=OFF", "-DAMCT_CUDA_ARCHS=80-real;90"
    MAX_JOBS          compilations at a time
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """A build tool of this environment, else of the machine."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise SystemExit(
            f"setup.py: {name} was not found; `pip install {name}` first (the build runs without isolation)"
        )
    return found


def npu_arguments() -> list[str]:
    """Where torch_npu is, if it is installed. It is not imported: that would need its driver."""
    spec = find_spec("torch_npu")
    return [f"-DAMCT_TORCH_NPU_ROOT={Path(spec.origin).parent}"] if spec is not None and spec.origin else []


def refresh_descriptors() -> None:
    """Bring the carried protobuf descriptors up to date where a protobuf compiler is installed; else they stay."""
    script = ROOT / "tools" / "generate_proto.py"
    if script.is_file() and find_spec("grpc_tools") is not None:
        current = subprocess.run([sys.executable, str(script), "--check"], check=False, capture_output=True)
        if current.returncode != 0:
            subprocess.run([sys.executable, str(script)], check=True)


def cuda_architectures() -> str:
    """What the CUDA kernels are compiled for: the cards of this machine, else what torch was built for."""
    import torch

    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}{minor}" for major, minor in sorted(found))
    flags = (torch._C._cuda_getArchFlags() or "") if torch.version.cuda else ""
    return ";".join(flag.removeprefix("sm_") + "-real" for flag in flags.split() if flag.startswith("sm_"))


class CMakeBuild(build_ext):
    """One CMake build for both native libraries, installed where the package is being assembled."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        refresh_descriptors()
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = self.build_folder
        configure = [
            tool("cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DAMCT_TORCH_ROOT={Path(torch.__file__).resolve().parent}",
            f"-DAMCT_TORCH_VERSION={torch.__version__}",
            f"-DAMCT_VERSION={self.distribution.get_version()}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *npu_arguments(),
            f"-DAMCT_CUDA_ARCHS={cuda_architectures()}",
            *shlex.split(os.environ.get("AMCT_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(folder), "--parallel", jobs], check=True)
        self.place(package)

    def copy_extensions_to_source(self) -> None:
        """An editable install and `build_ext --inplace` keep both libraries beside the Python sources."""
        self.place(ROOT / "amct_ext")

    @property
    def build_folder(self) -> Path:
        return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"

    def place(self, package: Path) -> None:
        install = [
            tool("cmake"),
            "--install",
            str(self.build_folder),
            "--component",
            "python",
            "--prefix",
            str(package),
        ]
        subprocess.run(install, check=True)


setup(ext_modules=[Extension("amct_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
