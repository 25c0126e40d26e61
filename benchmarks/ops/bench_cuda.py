"""Every op on a CUDA card: time, share of copy bandwidth, launches; writes the GPU part of docs/performance.md.

python -m benchmarks.ops.bench_cuda [--quick] [--no-compile] [--write]

Times are those of calls replayed from a CUDA graph (what the card needs) and of calls one after the other from Python
(what a step that is not captured sees).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import amct_ext
from amct_ext import ops
from benchmarks.document import write_part
from benchmarks.ops.activation_ulq import HIGH, LOW
from benchmarks.ops.activation_ulq import eager_backward as eager_ulq_backward
from benchmarks.ops.activation_ulq import written_out as written_out_ulq
from benchmarks.ops.calibration_search import eager as eager_search
from benchmarks.ops.sparsity_weight import eager_mask, written_out_mask
from benchmarks.ops.weight_arq import eager as eager_arq
from benchmarks.ops.weight_lsq import eager as eager_lsq
from benchmarks.ops.weight_lsq import eager_backward as eager_lsq_backward
from benchmarks.timing import Call

BEGIN, END = "<!-- cuda: begin (written by benchmarks/ops/bench_cuda.py) -->", "<!-- cuda: end -->"
MIB = 1 << 20
SIZES = (1, 8, 64, 512)
AIM, AIM_FROM = 0.85, 64
BASELINES_AT = 64
CALLS = 20
HEAD = "| op | MiB | launches | call us | graph us | GB/s | of copy | eager/ours | torch op/ours | Inductor/ours |"


@dataclass
class Op:
    """`moved` counts the bytes that must be read and written, with masks of one byte a value."""

    name: str
    dtype: torch.dtype
    mebibytes: int
    moved: int
    ours: Call
    eager: Call | None = None
    torch_op: Call | None = None
    written_out: Call | None = None


def measured_us(call: Call, rounds: int = 7) -> float:
    """Microseconds per call, median of rounds of CALLS calls between two events."""
    call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def captured(call: Call, calls: int = CALLS) -> Call:
    """A graph of so many calls, as one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def launches(call: Call) -> int:
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in trace.events())


def copy_us(bytes_moved: int) -> float:
    """What a copy takes that reads and writes so many bytes in all, from a graph."""
    source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return measured_us(captured(partial(target.copy_, source))) / CALLS


def activation_ops(mebibytes: int, dtype: torch.dtype) -> Iterator[Op]:
    e = dtype.itemsize
    n = mebibytes * MIB // e
    x, g = torch.randn(n, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
    high, low, none = (torch.tensor(v, device="cuda") for v in (HIGH, LOW, float("nan")))
    near = high.to(dtype), low.to(dtype)
    scale, zero = torch.tensor([(HIGH - LOW) / 255], device="cuda"), torch.zeros(1, device="cuda")
    learnable = partial(torch._fake_quantize_learnable_per_tensor_affine, x, scale, zero, -128, 127, 1.0)
    yield Op(
        "ulq forward", dtype, mebibytes, 2 * e * n, partial(ops.ulq_fake_quantize, x, high, low, none, none),
        partial(written_out_ulq, x, *near), learnable if e == 4 else None, partial(written_out_ulq, x, *near),
    )  # fmt: skip
    yield Op(
        "ulq backward", dtype, mebibytes, 3 * e * n, partial(ops.ulq_fake_quantize_backward, g, x, high, low),
        partial(eager_ulq_backward, g, x, *near), None, partial(eager_ulq_backward, g, x, *near),
    )  # fmt: skip
    if e == 4:
        yield Op("range search", dtype, mebibytes, e * n, partial(ops.search_clip_range, x), partial(eager_search, x))
        errors, deq = torch.zeros(1, 16, dtype=torch.float64, device="cuda"), torch.full((1,), 1e-4, device="cuda")
        yield Op("shift search", dtype, mebibytes, e * n, partial(ops.shift_error_, x.view(1, -1), deq, errors, 0))


def weight_ops(mebibytes: int, dtype: torch.dtype) -> Iterator[Op]:
    e = dtype.itemsize
    columns = 4096
    rows = mebibytes * MIB // e // columns
    n = rows * columns
    w, g = (torch.randn(rows, columns, device="cuda", dtype=dtype) for _ in range(2))
    scale = torch.full((rows,), 0.03, device="cuda")
    near, zero = scale.to(dtype), torch.zeros(rows, dtype=torch.int32, device="cuda")
    mask = ops.mask_2to4(w)
    per_channel = partial(torch.fake_quantize_per_channel_affine, w, scale, zero, 0, -128, 127)
    row = partial(Op, dtype=dtype, mebibytes=mebibytes)

    def sparsify(choose: object = eager_mask) -> Tensor:
        return w * choose(w)  # type: ignore[operator]

    yield row(
        name="arq", moved=2 * e * n, ours=partial(ops.arq_fake_quantize, w, 8, 0), eager=partial(eager_arq, w),
        torch_op=per_channel if e == 4 else None, written_out=partial(eager_arq, w),
    )  # fmt: skip
    yield row(
        name="lsq forward", moved=2 * e * n, ours=partial(ops.lsq_fake_quantize, w, scale, 8, 0),
        eager=partial(eager_lsq, w, near), written_out=partial(eager_lsq, w, near),
    )  # fmt: skip
    yield row(
        name="lsq backward", moved=2 * e * n, ours=partial(ops.lsq_fake_quantize_backward, g, w, scale, 8, 0),
        eager=partial(eager_lsq_backward, g, w, near), written_out=partial(eager_lsq_backward, g, w, near),
    )  # fmt: skip
    yield row(
        name="2:4 mask and apply", moved=(2 * e + 1) * n, ours=partial(ops.sparsify_2to4, w), eager=sparsify,
        written_out=partial(sparsify, written_out_mask),
    )  # fmt: skip
    yield row(
        name="2:4 and arq", moved=(2 * e + 1) * n, ours=partial(ops.sparse_arq_fake_quantize_2to4, w, 1, 8, 0),
        eager=lambda: eager_arq(sparsify()), written_out=lambda: eager_arq(sparsify(written_out_mask)),
    )  # fmt: skip
    yield row(
        name="masked arq", moved=(2 * e + 1) * n, ours=partial(ops.sparse_arq_fake_quantize, w, mask, 8, 0),
        eager=lambda: eager_arq(w * mask), written_out=lambda: eager_arq(w * mask),
    )  # fmt: skip
    yield row(name="apply mask", moved=(2 * e + 1) * n, ours=partial(ops.apply_mask, w, mask), eager=lambda: w * mask)


def compiled(call: Call) -> Call:
    def run() -> object:
        return call()

    return torch.compile(run, dynamic=False)


def measure(op: Op, compile_too: bool) -> str:
    call, graph = measured_us(op.ours), measured_us(captured(op.ours)) / CALLS
    share = copy_us(op.moved) / graph
    missed = op.mebibytes >= AIM_FROM and share < AIM and "search" not in op.name
    ratios = []
    for baseline in (op.eager, op.torch_op, compiled(op.written_out) if op.written_out and compile_too else None):
        ratios.append(f"{measured_us(baseline, 3) / call:.1f}x" if baseline and op.mebibytes == BASELINES_AT else "")
    cells = [
        f"{op.name} {str(op.dtype).removeprefix('torch.')}", str(op.mebibytes), str(launches(op.ours)), f"{call:.1f}",
        f"{graph:.1f}", f"{op.moved / graph / 1e3:.0f}", f"{share:.0%}{' (missed)' if missed else ''}", *ratios,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def many_weights() -> str:
    """Weights of the sizes of a ResNet-50, one call each and all in one call."""
    shapes = [(o, i, k, k) for o, i, k in ((64, 64, 3), (256, 64, 1), (512, 256, 1), (512, 512, 3)) for _ in range(12)]
    weights = [torch.randn(shape, device="cuda") for shape in shapes]
    each = measured_us(lambda: [ops.arq_fake_quantize(w, 8, 0) for w in weights])
    together = measured_us(partial(ops.arq_fake_quantize_many, weights))
    return (
        f"{len(weights)} weights of the sizes of a ResNet-50: {each:.0f} us one by one, {together:.0f} us in one call "
        f"({launches(partial(ops.arq_fake_quantize_many, weights))} launch(es))."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="float32 and 64 MiB only")
    parser.add_argument("--no-compile", action="store_true", help="leave Inductor out")
    parser.add_argument("--write", action="store_true", help="replace the GPU part of docs/performance.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not amct_ext.build_info()["cuda"]:
        raise SystemExit("bench_cuda.py: needs a CUDA card and an amct_ext that was built with CUDA")
    copied = 1024 * MIB
    head = (
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}. "
        f"Copy of 512 MiB: {copied / copy_us(copied) / 1e3:.0f} GB/s read and written. `of copy`: time of a copy that "
        f"moves the same bytes over ours, both from a graph; the aim is {AIM:.0%} from {AIM_FROM} MiB on. Sizes below "
        "that of the card's cache do not touch its memory."
    )
    lines = [head, "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    print("\n".join(lines), flush=True)
    for dtype in (torch.float32,) if arguments.quick else (torch.float32, torch.bfloat16, torch.float16):
        for size in (BASELINES_AT,) if arguments.quick else SIZES:
            for source in (activation_ops, weight_ops):
                for op in source(size, dtype):
                    lines.append(measure(op, not arguments.no_compile))
                    print(lines[-1], flush=True)
    lines += ["", many_weights()]
    print("\n".join(lines[-2:]))
    if arguments.write:
        write_part(BEGIN, END, lines)


if __name__ == "__main__":
    main()
