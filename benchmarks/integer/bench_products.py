"""The integer product of single convolutions beside torch's float convolution, in turns in one process.

    python -m benchmarks.integer.bench_products [--threads 1] [--rounds 15] [--batch 8] [--clock cpu]

One process measures one kernel of the product. To see another processor's speed, limit all parts alike:

    AMCT_PRODUCT_LEVEL=avx2 AMCT_SIMD_LEVEL=v3 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
        MKL_ENABLE_INSTRUCTIONS=AVX2 python -m benchmarks.integer.bench_products

Printed: shortest times, channels last throughout, and the shortest time of the product to that of the float
convolution: with float results, and with codes for the next layer.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import amct_ext
from amct_ext import ops
from benchmarks.integer.bench_integer import CLOCKS, Run, time_in_rounds


class Shape(NamedTuple):
    """A square convolution, padded by half of its filter."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int  # of the input


# Those of ResNet-50, and the pointwise layers of MobileNetV2.
SHAPES = (
    Shape(3, 64, 7, 2, 224),
    Shape(64, 64, 1, 1, 56),
    Shape(64, 64, 3, 1, 56),
    Shape(64, 256, 1, 1, 56),
    Shape(256, 64, 1, 1, 56),
    Shape(256, 512, 1, 2, 56),
    Shape(128, 128, 3, 1, 28),
    Shape(512, 128, 1, 1, 28),
    Shape(256, 256, 3, 2, 28),
    Shape(1024, 256, 1, 1, 14),
    Shape(512, 512, 3, 1, 7),
    Shape(512, 2048, 1, 1, 7),
    Shape(16, 96, 1, 1, 112),
    Shape(144, 24, 1, 1, 56),
    Shape(32, 192, 1, 1, 28),
    Shape(960, 160, 1, 1, 7),
)


def runs(shape: Shape, batch: int) -> dict[str, Run]:
    """The float convolution and the two products; weights are normal, the largest of an output channel is code 127."""
    x = torch.rand(batch, shape.inputs, shape.size, shape.size).to(memory_format=torch.channels_last)
    w = torch.randn(shape.outputs, shape.inputs, shape.kernel, shape.kernel)
    one, none = torch.tensor(1.0), torch.tensor(math.nan)
    clips = (one, 0 * one, none, none)
    codes, scale, offset, *_ = ops.ulq_quantize(x, *clips)
    w_scale = w.abs().amax((1, 2, 3)) / 127
    packed, sums = ops.pack_weight(w, w_scale)
    product = (codes, scale, offset, packed, sums, w_scale, torch.zeros(shape.outputs))
    stride, padding = (shape.stride,) * 2, (shape.kernel // 2,) * 2
    geometry = ((shape.kernel,) * 2, stride, padding, (1, 1))
    weight: Tensor = w.to(memory_format=torch.channels_last)
    bias = torch.zeros(shape.outputs)
    return {
        "float": lambda: F.conv2d(x, weight, bias, stride, padding),
        "floats": lambda: ops.integer_conv2d(*product, *geometry, True),
        "codes": lambda: ops.integer_conv2d_codes(*product, *geometry, 0.0, None, *clips),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    info = amct_ext.build_info()
    table = Table(title=f"{info['integer_product']}, loops {info['simd']}, batch {args.batch}, {args.threads} threads")
    for heading in ("inputs", "outputs", "kernel", "stride", "size", "float ms", "to floats", "to codes"):
        table.add_column(heading, justify="right")
    ratios: list[tuple[float, float]] = []
    for shape in SHAPES:
        times = time_in_rounds(runs(shape, args.batch), args.rounds, CLOCKS[args.clock])
        best = {name: min(values) for name, values in times.items()}
        ratios.append((best["floats"] / best["float"], best["codes"] / best["float"]))
        table.add_row(*map(str, shape), f"{best['float']:.2f}", *(f"{ratio:.2f}" for ratio in ratios[-1]))
    mean = (math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*ratios, strict=True))
    table.add_row("geometric mean", *[""] * 5, *(f"{ratio:.2f}" for ratio in mean))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
