"""What a row of the op table is: an op on one input, its baselines, and the floor (one torch call moving the bytes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo import config as compiler

from benchmarks.timing import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = torch.finfo(torch.float32).eps
Shape = tuple[int, ...]
ACTIVATIONS: tuple[Shape, ...] = ((32, 64, 56, 56), (8, 256, 56, 56))
WEIGHTS: tuple[Shape, ...] = ((512, 512, 3, 3), (4096, 1024))

# A function is compiled anew for every dtype, shape and number of threads; past the limit it would run eagerly.
compiler.recompile_limit = 64


@dataclass
class Calls:
    """What is timed. `limit` is the ratio to the floor that we mean to keep; `fresh` is the floor with a result that
    is allocated, as that of an op is."""

    ours: Call
    floor: Call
    floor_name: str = "copy_"
    limit: float | None = None
    eager: Call | None = None
    torch_op: Call | None = None
    inductor: Call | None = None
    fresh: Call | None = None


@dataclass(frozen=True)
class Row:
    """An op on one input. `build` makes the tensors, so a list of rows holds no memory."""

    op: str
    shape: Shape
    dtype: torch.dtype
    build: Callable[[Shape, torch.dtype], Calls]

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"

    def calls(self) -> Calls:
        return self.build(self.shape, self.dtype)


def activations(dtype: torch.dtype) -> tuple[Shape, ...]:
    return _shapes(dtype, ACTIVATIONS, ACTIVATIONS[:1])


def weights(dtype: torch.dtype) -> tuple[Shape, ...]:
    return _shapes(dtype, WEIGHTS, WEIGHTS[1:])


def _shapes(dtype: torch.dtype, single: tuple[Shape, ...], other: tuple[Shape, ...]) -> tuple[Shape, ...]:
    if dtype == torch.float64:
        # As many bytes as float32 has. glibc maps results of more than 32 MiB anew in every call; clearing their pages
        # takes several times the op, while the floor writes to memory that is there.
        return tuple((shape[0] // 2, *shape[1:]) for shape in other)
    return single if dtype == torch.float32 else other


def rows(
    op: str, shapes: Callable[[torch.dtype], tuple[Shape, ...]], build: Callable[[Shape, torch.dtype], Calls]
) -> Iterator[Row]:
    """The op on every dtype and shape."""
    for dtype in DTYPES:
        for shape in shapes(dtype):
            yield Row(op, shape, dtype, build)


def cache_bytes() -> int:
    """What the last level of the cache holds; 32 MiB where the system does not say."""
    said = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(said.read_text().strip().removesuffix("K")) << 10 if said.exists() else 32 << 20


def compiled(function: Callable[..., object], *arguments: object) -> Call:
    """A call under Inductor; the first one compiles."""
    made = torch.compile(function, dynamic=False)
    return lambda: made(*arguments)


def copy(x: Tensor) -> Call:
    """The floor of an op that reads x and writes as much."""
    out = torch.empty_like(x)
    return lambda: out.copy_(x)


def add(x: Tensor, g: Tensor) -> Call:
    """The floor of an op that reads two tensors and writes one."""
    out = torch.empty_like(x)
    return lambda: torch.add(x, g, out=out)
