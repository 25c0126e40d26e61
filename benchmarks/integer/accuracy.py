"""Do the float and the integer forward train to the same accuracy? The digits of the demo, several seeds.

    python -m benchmarks.integer.accuracy [--seeds 5] [--epochs 6] [--config sparse_int8.cfg]
    python -m benchmarks.integer.accuracy --network resnet-18 --epochs 16

Each seed trains a float network, then retrains it compressed along both paths from the same start with the same data:
19 steps an epoch. The second network is a ResNet-18 of half the width on the digits enlarged to 32x32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import amct_ext as amct
from benchmarks.step.models import Logits

DEMO = Path(__file__).resolve().parents[2] / "examples" / "digits"
sys.path.insert(0, str(DEMO))

import data as digits  # noqa: E402
import model as network  # noqa: E402
import train as demo  # noqa: E402


def resnet18(seed: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    widths: Any = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2]}
    other: Any = {"num_channels": 1, "num_labels": 10, "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**widths, **other))
    return nn.Sequential(nn.Upsample(scale_factor=4, mode="bilinear"), Logits(model))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"demo": network.build_model, "resnet-18": resnet18}


def trained(model: nn.Module, data: digits.Digits, seed: int, epochs: int, peak: float) -> float:
    """Trains in place as the demo does; the accuracy on the test set."""
    torch.manual_seed(seed)
    optimizer, per_epoch = demo.make_optimizer(model.train()), data.steps_per_epoch(demo.BATCH)
    for step in range(epochs * per_epoch):
        epoch, batch = divmod(step, per_epoch)
        order = digits.epoch_order(len(data.train_x), seed, epoch)
        picked = order[batch * demo.BATCH : (batch + 1) * demo.BATCH]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * demo.learning_rate(step, epochs * per_epoch, peak)
        demo.train_step(model, optimizer, digits.shift_randomly(data.train_x[picked]), data.train_y[picked])
    return demo.accuracy(demo.scores(model, data.test_x), data.test_y)


def compressed(start: nn.Module, config: Path) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        record = str(Path(folder) / "record.txt")
        return amct.create_compressed_retrain_model(copy.deepcopy(start), demo.SAMPLE, str(config), record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--network", choices=NETWORKS, default="demo")
    parser.add_argument("--config", default="sparse_int8.cfg", help="a configuration of the demo")
    args = parser.parse_args()
    data = digits.load_data()
    results: dict[str, list[float]] = {"float32": [], "float": [], "integer": []}
    for seed in range(args.seeds):
        start = NETWORKS[args.network](seed)
        results["float32"].append(trained(start, data, seed, args.epochs, 3e-3))
        for forward in ("float", "integer"):
            model = compressed(start, DEMO / args.config)
            amct.configure(model, forward=forward)
            results[forward].append(trained(model, data, seed, args.epochs, 1e-3))
        print(seed, {name: round(values[-1], 4) for name, values in results.items()}, flush=True)
    for name, values in results.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name}: mean {statistics.mean(values):.4f}, standard deviation {spread:.4f}")


if __name__ == "__main__":
    main()
