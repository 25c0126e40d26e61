"""The whole job on real data: train, compress, retrain, lose the process, restore, go on, evaluate, export.

    python examples/digits/demo.py [--out FOLDER] [--threads N] [--epochs N]

Ends with a table and a picture; exits with status 1 if the restored run differs from the uninterrupted one in a single
bit, if accuracy is lost, or if the exported model disagrees with the trained one.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import summary
import torch
from data import Digits, load_data
from measure import int8_initializers, onnx_scores, step_times, weight_count
from rich.console import Console
from rich.progress import Progress
from runs import Run, progress_bar, watch
from summary import Compressed
from torch import Tensor, nn
from train import BATCH, SAMPLE, accuracy, make_model, scores, starting_model

import amct_ext as amct
from amct_ext.record.text import read_record

HERE = Path(__file__).resolve().parent
CONFIGURATIONS = {"channels pruned + INT8": "prune_int8.cfg", "2:4 sparse + INT8": "sparse_int8.cfg"}
CALIBRATION_BATCHES = 2  # `batch_num` of the configurations
ALLOWED_LOSS = 0.01  # accuracy, after retraining
ALLOWED_FLIPS = 0.01  # share of test images on which the exported model may answer otherwise


def terminal() -> Console:
    """Written to a file or pipe, rich would assume 80 columns, too few for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


@dataclass
class Job:
    """What all parts of the demo need to know."""

    out: Path
    data: Digits
    console: Console
    common: list[str]
    epochs: int
    threads: int
    failures: list[str] = field(default_factory=list)

    def check(self, what: str, holds: bool, detail: str = "") -> None:
        self.console.print(f"  {what}: {'[green]yes' if holds else '[red]NO'}[/] {detail}", highlight=False)
        if not holds:
            self.failures.append(what)

    @property
    def kill_at(self) -> int:
        """In the middle of an epoch, a little after the run's middle and not on a checkpoint."""
        per_epoch = self.data.steps_per_epoch(BATCH)
        return (self.epochs // 2) * per_epoch + (2 * per_epoch) // 3


def same_bits(a: Any, b: Any) -> bool:
    """Equality of everything in a checkpoint; tensors by their bytes, so NaN equals NaN, and -0.0 is not 0.0."""
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


def accuracy_before_retraining(job: Job, folder: Path, config: Path, start: Path) -> float:
    """Compresses, lets the calibration see training images in eval mode, scores the test set."""
    folder.mkdir(parents=True)
    model = make_model(folder, config, start)
    for batch in job.data.train_x.split(BATCH)[:CALIBRATION_BATCHES]:
        scores(model, batch)
    return accuracy(scores(model, job.data.test_x), job.data.test_y)


def retrain_twice(job: Job, folder: Path, arguments: list[str], progress: Progress) -> tuple[Run, Run, Run]:
    """One run without and one with a kill, side by side, in folders of their own."""
    killed_arguments = [*arguments, "--run", str(folder / "killed")]
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(watch, [*arguments, "--run", str(folder / "uninterrupted")], progress, "uninterrupted")
        killed = watch(killed_arguments, progress, "to be killed", kill_at=job.kill_at)
        resumed = watch(killed_arguments, progress, "restored, fresh process")
    return whole.result(), killed, resumed


def compare(job: Job, folder: Path, killed: Run, resumed: Run) -> None:
    whole_state, resumed_state = (
        torch.load(folder / run / "last.pth", weights_only=True) for run in ("uninterrupted", "killed")
    )
    step = max(killed.losses)
    job.console.print(
        f"  SIGKILL after step {step}, at epoch {step / job.data.steps_per_epoch(BATCH):.2f}; "
        f"restored at step {killed.saved}, {step - killed.saved} steps back",
        highlight=False,
    )
    job.check("went on from the last checkpoint", min(resumed.losses) == killed.saved + 1)
    job.check(
        "bit for bit equal", same_bits(whole_state, resumed_state), "(model, optimizer, random state, all losses)"
    )
    again = all(resumed.losses[step] == killed.losses[step] for step in killed.losses if step > killed.saved)
    job.check("lost steps done again give the same losses", again)
    records = [(folder / run / "record.txt").read_bytes() for run in ("uninterrupted", "killed")]
    job.check("record files equal", records[0] == records[1])


def export(job: Job, model: nn.Module, folder: Path, answers: Tensor) -> float:
    """Saves both ONNX files, scores the fake-quant one with onnxruntime; its accuracy."""
    prefix = folder / "digits"
    amct.save_compressed_retrain_model(
        model,
        str(folder / "killed" / "record.txt"),
        str(prefix),
        SAMPLE,
        input_names=["images"],
        output_names=["scores"],
        dynamic_axes={"images": {0: "batch"}, "scores": {0: "batch"}},
    )
    exported = onnx_scores(prefix.with_name("digits_fake_quant_model.onnx"), job.data.test_x, job.threads)
    flips = (exported.argmax(1) != answers.argmax(1)).float().mean().item()
    gap = (exported - answers).abs().max().item()
    job.check(
        "ONNX agrees with the model",
        flips <= ALLOWED_FLIPS,
        f"({100 * flips:.2f} % other answers, {gap:.1e} off at most)",
    )
    weights = int8_initializers(prefix.with_name("digits_deploy_model.onnx"))
    job.check("deploy model holds all weights as INT8", weights == weight_count(model), f"({weights:,} B)")
    return accuracy(exported, job.data.test_y)


def compress(job: Job, name: str, config: Path, start: Path, float_accuracy: float) -> Compressed:
    """The job for one configuration."""
    job.console.rule(name, align="left")
    folder = job.out / config.stem
    before = accuracy_before_retraining(job, folder / "before", config, start)
    arguments = [*job.common, "--config", str(config), "--start", str(start), "--epochs", str(job.epochs)]
    with progress_bar(job.console) as progress:
        whole, killed, resumed = retrain_twice(job, folder, arguments, progress)
    compare(job, folder, killed, resumed)

    model = make_model(folder / "killed", config, start)
    answers = scores(model, job.data.test_x)
    after = accuracy(answers, job.data.test_y)
    job.check("restored model scores as the run did", after == list(resumed.accuracies.values())[-1])
    job.check("within one point of float", after >= float_accuracy - ALLOWED_LOSS, f"({100 * after:.2f} %)")
    onnx_accuracy = export(job, model, folder, answers)
    record = read_record(folder / "killed" / "record.txt")
    if record.channel:
        proof = amct.verify_pruning(starting_model(start), model, SAMPLE)
        job.check("pruned network is the whole one without the removed channels", proof.error < 1e-5, f"({proof})")
    return Compressed(name, model, record, before, after, onnx_accuracy, whole, killed, resumed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder for everything written")
    parser.add_argument("--threads", type=int, default=1, help="of each training process")
    parser.add_argument("--epochs", type=int, default=12, help="of retraining")
    parser.add_argument("--float-epochs", type=int, default=14)
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(args.threads)
    shutil.rmtree(args.out, ignore_errors=True)
    started = time.perf_counter()

    job = Job(args.out, load_data(), terminal(), ["--threads", str(args.threads)], args.epochs, args.threads)
    job.console.rule("float32", align="left")
    arguments = [*job.common, "--run", str(job.out / "float"), "--epochs", str(args.float_epochs)]
    with progress_bar(job.console) as progress:
        float_run = watch(arguments, progress, "training")
    start = job.out / "float" / "last.pth"
    float_accuracy = list(float_run.accuracies.values())[-1]

    done = [compress(job, name, HERE / cfg, start, float_accuracy) for name, cfg in CONFIGURATIONS.items()]
    float_model = starting_model(start)
    times = step_times({"float32": starting_model(start)} | {c.name: c.model for c in done}, job.data)
    job.console.print(summary.table(float_model, float_accuracy, done, times))
    summary.picture(job.out / "report.png", float_run, float_model, done, job.data.steps_per_epoch(BATCH))
    job.console.print(f"picture: {job.out / 'report.png'}", highlight=False, soft_wrap=True)
    job.console.print(f"{time.perf_counter() - started:.0f} s", highlight=False)
    if job.failures:
        job.console.print(f"[red]failed: {', '.join(job.failures)}")
    return 1 if job.failures else 0


if __name__ == "__main__":
    sys.exit(main())
