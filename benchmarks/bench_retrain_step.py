"""One whole training step of a small ResNet: float against fused, fused with 2:4, and the same maths in eager torch.

    python benchmarks/bench_retrain_step.py [--batch 32] [--size 32] [--threads 2] [--rounds 15]

The models take turns in one process, so a busy moment of the machine hits them all. Printed: medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from eager_quant import quantise_eagerly
from resnet import small_resnet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import amct_ext as amct

INT8 = "batch_num: 1 retrain_data_quant_config { ulq_quantize { } } retrain_weight_quant_config { arq_retrain { } }"
SPARSE = "prune_config { n_out_of_m_pruner { l1_selective_prune { update_freq: %d } } } " + INT8


def compressed(config: str, sample: Tensor) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compress.cfg"
        path.write_text(config)
        return amct.create_compressed_retrain_model(seeded(), sample, str(path), str(Path(folder) / "record.txt"))


def seeded() -> nn.Module:
    torch.manual_seed(0)
    return small_resnet()


def stepper(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of plain SGD; the learning rate is so small that all steps do the same work."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def first_step_time(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def bytes_kept(model: nn.Module, images: Tensor) -> int:
    """What the graph of one forward holds, weights included, every storage once."""
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        return storages.setdefault(x.untyped_storage().data_ptr(), x)

    with saved_tensors_hooks(pack, lambda x: x):
        model(images)
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def take_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):  # two rounds warm up
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn > 1:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch, 3, args.size, args.size), torch.randint(0, 10, (args.batch,))

    models = {
        "float32": seeded(),
        "INT8, fused": compressed(INT8, images[:2]),
        "INT8, fused, inputs rebuilt": compressed(INT8, images[:2]),
        "2:4 + INT8, fused, masks kept": compressed(SPARSE % 0, images[:2]),
        "2:4 + INT8, fused, masks renewed each step": compressed(SPARSE % 1, images[:2]),
        "INT8, eager torch": quantise_eagerly(seeded()),
    }
    amct.configure(models["INT8, fused, inputs rebuilt"], stash="rebuild")
    steps = {name: stepper(model, images, labels) for name, model in models.items()}
    first = {name: first_step_time(step) for name, step in steps.items()}
    kept = {name: bytes_kept(model, images) for name, model in models.items()}
    times = {name: statistics.median(values) for name, values in take_turns(steps, args.rounds).items()}

    table = Table(
        title=f"one training step, batch {args.batch} of {args.size}x{args.size}, {args.threads} threads, median ms"
    )
    for heading in ("", "step", "against float", "against eager INT8", "first step", "kept for backward"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in times.items():
        ratios = [f"{value / times[rival]:.2f}x" for rival in ("float32", "INT8, eager torch")]
        table.add_row(name, f"{value:.1f}", *ratios, f"{first[name]:.0f}", f"{kept[name] / 2**20:.1f} MiB")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
