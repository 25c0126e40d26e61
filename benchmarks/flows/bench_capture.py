"""Time of create and of save, against one recorded forward and against torch.onnx.export of the same network.

    python -m benchmarks.flows.bench_capture [--networks many-layers update-block] [--rounds 3] [--size 128]

The calls of a network take turns in one process, on one thread. Printed: the median of the rounds, in seconds of the
processor, and the ratios: of create to one recorded forward (graph/recorder.py), of save to the exporter of
torch.export with its own defaults (``dynamo=True``, optimised). ``quant`` is INT8 alone, ``filter_quant`` also prunes.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import amct_ext
from amct_ext.export.capture import quiet
from amct_ext.graph.recorder import record

QUANT = "retrain_data_quant_config { ulq_quantize { } }\nretrain_weight_quant_config { arq_retrain { } }\n"
FILTER = (
    "prune_config { filter_pruner { balanced_l2_norm_filter_prune { prune_ratio: 0.3 ascend_optimized: false } } }\n"
)
CONFIGS = {"quant": QUANT, "filter_quant": FILTER + QUANT}


class DenseLayer(nn.Module):
    """DenseNet's layer: its input and what it computes, concatenated. Source: arXiv:1608.06993."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def many_layers(growth: int = 16) -> nn.Module:
    """120 convolutions and 58 concatenations, as in DenseNet-121."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    channels = 64
    for block, depth in enumerate((6, 12, 24, 16)):
        if block:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class UpdateBlock(nn.Module):
    """One block that runs twelve times, as in RAFT (arXiv:2003.12039): a gated update of a hidden state."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 7, 2, 3), nn.InstanceNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, channels, 3, 2, 1), nn.InstanceNorm2d(channels), nn.ReLU(),
        )  # fmt: skip
        self.gate, self.reset, self.new = (nn.Conv2d(2 * channels + 2, channels, 3, padding=1) for _ in range(3))
        self.flow = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        hidden, flow = features.tanh(), features[:, :2] * 0
        for _ in range(12):
            given = torch.cat([hidden, features, flow], 1)
            gate, reset = self.gate(given).sigmoid(), self.reset(given).sigmoid()
            hidden = (1 - gate) * hidden + gate * self.new(torch.cat([reset * hidden, features, flow], 1)).tanh()
            flow = flow + self.flow(hidden)
        return flow


def plain(width: int = 64) -> nn.Module:
    """Twenty convolutions with BatchNorm, one after another."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3), nn.ReLU()]
    for _ in range(20):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "many-layers": many_layers,
    "update-block": UpdateBlock,
    "plain": plain,
}


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of the rounds after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def measure(network: str, config: str, rounds: int, size: int, folder: Path) -> list[str]:
    """One row of the table."""
    torch.manual_seed(0)
    net, x = NETWORKS[network]().eval(), torch.rand(1, 3, size, size)
    job, factors, out = str(folder / "job.cfg"), str(folder / "record.txt"), str(folder / "net")
    Path(job).write_text(CONFIGS[config])
    model = amct_ext.create_compressed_retrain_model(net, x, job, factors)
    with torch.no_grad():
        model.train()(x.expand(2, -1, -1, -1))
        model.eval()(x)
    kept = Path(factors).read_text()

    def save() -> None:
        Path(factors).write_text(kept)  # create writes one without factors
        amct_ext.save_compressed_retrain_model(model, factors, out, x)

    def export() -> None:
        with quiet():
            torch.onnx.export(net, (x,), f"{out}.onnx", dynamo=True, opset_version=18, verbose=False)

    def create() -> None:
        amct_ext.create_compressed_retrain_model(net, x, job, str(folder / "other.txt"))

    at_create = in_turns({"record": lambda: record(net, x), "create": create}, 2 * rounds)
    at_save = in_turns({"export": export, "save": save}, rounds)
    row = [at_create["record"], at_create["create"], at_create["create"] / at_create["record"]]
    row += [at_save["export"], at_save["save"], at_save["save"] / at_save["export"]]
    return [network, config, *(f"{value:.2f}" for value in row)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="height and width of the image")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("amct_ext").setLevel(logging.ERROR)
    table = Table("network", "config", "record s", "create s", "ratio", "export s", "save s", "ratio")
    for network in args.networks:
        for config in args.configs:
            with tempfile.TemporaryDirectory() as folder:
                table.add_row(*measure(network, config, args.rounds, args.size, Path(folder)))
    Console().print(table)


if __name__ == "__main__":
    main()
