"""Peak memory of a training job: resident set of a process of its own, or what CUDA's allocator counted."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from typing import Any

import torch

from benchmarks.step.models import JOBS
from benchmarks.step.variants import make, stepper

STEPS = 3


def peak_resident(job: str, variant: str, samples: int, threads: int) -> float:
    """MiB of a fresh process that makes the variant and trains it for some steps, libraries included."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step.variants", "transformers"])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(writer, job, variant, samples, threads))
    process.start()
    writer.close()
    peak: float = reader.recv()
    process.join()
    return peak


def _child(writer: Any, name: str, variant: str, samples: int, threads: int) -> None:
    torch.set_num_threads(threads)
    _train(name, variant, samples, torch.device("cpu"))
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    writer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def peak_cuda(name: str, variant: str, samples: int) -> float:
    """MiB that CUDA's allocator handed out at most."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _train(name, variant, samples, torch.device("cuda"))
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _train(name: str, variant: str, samples: int, device: torch.device) -> None:
    job = JOBS[name]
    torch.manual_seed(0)
    x, labels = job.batch(samples)
    step = stepper(make(variant, job, x[:1]).to(device), x.to(device), labels.to(device))
    for _ in range(STEPS):
        step()
