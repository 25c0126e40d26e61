"""What the step benchmark compares: the float model, ours in every form, and baselines; one training step of each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import amct_ext as amct
from amct_ext.layers.chains.chain_values import ChainTensorBase
from benchmarks.step.eager_quant import quantize_eagerly, quantize_with_torch_ops
from benchmarks.step.models import Job

_DATA, _ADAPTIVE = "retrain_data_quant_config { ulq_quantize { } } ", "retrain_weight_quant_config { arq_retrain { } } "
_SPARSE = "prune_config { n_out_of_m_pruner { l1_selective_prune { update_freq: 1 } } } "
INT8 = _DATA + _ADAPTIVE
LEARNED = _DATA + "retrain_weight_quant_config { ulq_retrain { } } "
BOTH = _SPARSE + INT8

FLOAT, EAGER = "float32", "INT8, eager torch"
OURS = {
    "INT8": INT8,
    "INT8, not fused": INT8,
    "INT8, inputs kept": INT8,
    "INT8, forward auto": INT8,
    "INT8, learned scales": LEARNED,
    "2:4, renewed each step": _SPARSE,
    "2:4 renewed + INT8": BOTH,
}
BASELINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    EAGER: quantize_eagerly,
    "INT8, torch's fake-quant ops": quantize_with_torch_ops,
}
VARIANTS = (FLOAT, *OURS, *BASELINES)


def make(variant: str, job: Job, sample: Tensor, compiled: bool = False) -> nn.Module:
    """The model of a variant, in train mode; ``sample`` is a small batch for the trace."""
    model = job.model()
    if variant in OURS:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "compress.cfg"
            config.write_text(OURS[variant])
            model = amct.create_compressed_retrain_model(model, sample, str(config), str(Path(folder) / "record.txt"))
        if variant.endswith("inputs kept"):
            amct.configure(model, stash="off")
        if variant.endswith("not fused"):
            amct.configure(model, fuse="off")
        if variant.endswith("forward auto"):
            amct.configure(model, forward="auto")
    elif variant in BASELINES:
        model = BASELINES[variant](model)
    model.train()
    return torch.compile(model) if compiled else model  # type: ignore[return-value]


def stepper(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of SGD; the learning rate is so small that all steps do the same work."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def bytes_kept(model: nn.Module, x: Tensor) -> int:
    """What the graph of one forward holds, weights included, every storage once."""
    storages: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        kept = value.chain_values.stored if isinstance(value, ChainTensorBase) else value
        storages.setdefault(kept.untyped_storage().data_ptr(), kept)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        model(x)
    return sum(value.untyped_storage().nbytes() for value in storages.values())
