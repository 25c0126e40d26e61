"""One training run in a folder: started again, the same command goes on from the folder's last checkpoint.

    python train.py --run out/float
    python train.py --run out/pruned --start out/float/last.pth --config prune_int8.cfg

A checkpoint holds all that the next step depends on (model, optimizer, random state, number of steps done), so a run
that was killed at any moment ends with the same bits as one that was not. Each step prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import Digits, epoch_order, load_data, shift_randomly
from model import build_model
from torch import Tensor, nn

import amct_ext as amct

BATCH = 64
SAMPLE = torch.zeros(2, 1, 8, 8)  # the shape of an input; its values do not matter


def starting_model(start: Path | None) -> nn.Module:
    """The uncompressed network, with trained weights if there are any."""
    model = build_model()
    if start is not None:
        model.load_state_dict(torch.load(start, weights_only=True)["model"])
    return model


def make_model(run: Path, config: Path | None, start: Path | None) -> nn.Module:
    """The network of a run: restored where it has a checkpoint, else created."""
    model, last, record = starting_model(start), run / "last.pth", str(run / "record.txt")
    if config is None:
        if last.exists():
            model.load_state_dict(torch.load(last, weights_only=True)["model"])
        return model
    if last.exists():
        return amct.restore_compressed_retrain_model(model, SAMPLE, str(config), record, str(last), "model")
    return amct.create_compressed_retrain_model(model, SAMPLE, str(config), record)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam moves a parameter by about the learning rate, whatever its size. A weight's scale is some hundred times
    smaller than a weight, so it gets a rate of its own; decay is for weights alone."""
    weights: list[nn.Parameter] = []
    clips: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        kind = scales if name.endswith("weight_quant.scale") else clips if ".act_quant." in name else weights
        kind.append(parameter)
    return torch.optim.AdamW(
        [
            {"params": weights, "rate": 1.0, "weight_decay": 1e-2},
            {"params": clips, "rate": 1.0, "weight_decay": 0.0},
            {"params": scales, "rate": 0.003, "weight_decay": 0.0},
        ]
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth, then a cosine; a function of the step, so there is no scheduler to save."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def scores(model: nn.Module, images: Tensor) -> Tensor:
    """What the model answers in eval mode; its mode is restored."""
    training = model.training
    model.eval()
    answers = model(images)
    model.train(training)
    return answers


def accuracy(answers: Tensor, labels: Tensor) -> float:
    return (answers.argmax(1) == labels).float().mean().item()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Written beside the old one and moved over it: a kill leaves the old or the new one, never half."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def train(
    run: Path, data: Digits, config: Path | None, start: Path | None, epochs: int, peak: float, every: int
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = make_model(run, config, start)
    optimizer = make_optimizer(model)
    done, losses, accuracies = 0, [], []
    if (run / "last.pth").exists():
        checkpoint = torch.load(run / "last.pth", weights_only=True)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"])
        done, losses, accuracies = checkpoint["done"], checkpoint["losses"], checkpoint["accuracies"]

    per_epoch = data.steps_per_epoch(BATCH)
    steps = epochs * per_epoch
    model.train()
    for step in range(done, steps):
        epoch, batch = divmod(step, per_epoch)
        picked = epoch_order(len(data.train_x), 0, epoch)[batch * BATCH : (batch + 1) * BATCH]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step, steps, peak)
        loss = train_step(model, optimizer, shift_randomly(data.train_x[picked]), data.train_y[picked])
        losses.append(loss.item())
        event: dict[str, Any] = {"step": step + 1, "of": steps, "loss": losses[-1]}
        if batch == per_epoch - 1:
            accuracies.append(accuracy(scores(model, data.test_x), data.test_y))
            event["accuracy"] = accuracies[-1]
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
            save_checkpoint(run / "last.pth", state | {"done": step + 1, "losses": losses, "accuracies": accuracies})
            event["saved"] = True
        print(json.dumps(event), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--config", type=Path, help="compression configuration; without it the run trains in float32")
    parser.add_argument("--start", type=Path, help="checkpoint of a float run to start from")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--checkpoint-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--threads", type=int, default=1, help="results are equal bit for bit at an equal number only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.run, load_data(), args.config, args.start, args.epochs, args.learning_rate, args.checkpoint_every)


if __name__ == "__main__":
    main()
