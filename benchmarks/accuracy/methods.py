"""Everything that is compared: float networks, amct_ext and its options, other toolkits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from torch import Tensor, nn

from benchmarks.accuracy.amct import Options, compress
from benchmarks.accuracy.prepared_model import PreparedModel
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import Setting

Prepare = Callable[[nn.Module, Task, Setting], PreparedModel]


@dataclass(frozen=True)
class Method:
    """``package``: what must be installed, None for nothing; ``kind``: which rows of the tables it belongs to."""

    name: str
    label: str
    prepare: Prepare
    package: str | None = None
    kind: Literal["float", "peer", "ours", "option"] = "peer"

    def installed(self) -> str | None:
        """The version of the package; None where it is missing."""
        if self.package is None:
            return ""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _float(model: nn.Module, task: Task, setting: Setting, needs_training: bool) -> PreparedModel:
    return PreparedModel(model, needs_training=needs_training)


def _distilled(prepare: Prepare) -> Prepare:
    """Half of the loss from the float network that the run starts with."""

    def prepare_distilled(model: nn.Module, task: Task, setting: Setting) -> PreparedModel:
        from amct_ext import DistillationLoss

        teacher = copy.deepcopy(model)
        prepared = prepare(model, task, setting)
        distillation = DistillationLoss(prepared.model, teacher, distance=task.distillation)

        def loss_fn(x: Tensor, output: Tensor, target: Tensor) -> Tensor:
            return distillation(task.loss(output, target))

        prepared.loss_fn = loss_fn
        return prepared

    return prepare_distilled


def _amct(**options: object) -> Prepare:
    chosen = Options(**options)  # type: ignore[arg-type]
    return functools.partial(compress, options=chosen)


def _peer(module: str, function: str = "prepare", **options: object) -> Prepare:
    """A function of a peer's module, imported when it is called."""

    def prepare(model: nn.Module, task: Task, setting: Setting) -> PreparedModel:
        import importlib

        peer = importlib.import_module(f"benchmarks.accuracy.peers.{module}")
        prepared: PreparedModel = getattr(peer, function)(model, task, setting, **options)
        return prepared

    return prepare


_BEST = _amct(profile="BEST")
_LIST = (
    Method("float", "float", functools.partial(_float, needs_training=False), kind="float"),
    Method("float-budget", "float + budget", functools.partial(_float, needs_training=True), kind="float"),
    Method("modelopt", "ModelOpt", _peer("modelopt"), "nvidia-modelopt"),
    Method("brevitas", "Brevitas", _peer("brevitas"), "brevitas"),
    Method("nncf", "NNCF", _peer("nncf"), "nncf"),
    Method("pt2e", "torchao PT2E", _peer("torchao", "prepare_pt2e"), "torchao"),
    Method("torchao", "torchao, linear layers", _peer("torchao", "prepare_linear"), "torchao"),
    Method("pruning-l2", "Torch-Pruning, group L2", _peer("torch_pruning"), "torch-pruning"),
    Method("pruning-taylor", "Torch-Pruning, Taylor", _peer("torch_pruning", importance="taylor"), "torch-pruning"),
    Method(
        "pruning-l2-best",
        "Torch-Pruning, group L2, then BEST",
        _peer("torch_pruning", profile="BEST"),
        "torch-pruning",
    ),
    Method(
        "pruning-taylor-best",
        "Torch-Pruning, Taylor, then BEST",
        _peer("torch_pruning", importance="taylor", profile="BEST"),
        "torch-pruning",
    ),
    Method("amct", "amct_ext, default", _amct(), kind="ours"),
    Method("amct-best", "amct_ext, BEST", _BEST, kind="ours"),
    Method("amct-best-learned", "amct_ext, BEST, ulq_retrain", _amct(profile="BEST", learned_scales=True), kind="ours"),
    Method(
        "amct-best-float-recurrent",
        "amct_ext, BEST, LSTM or GRU float",
        _amct(profile="BEST", float_recurrent=True),
        kind="ours",
    ),
    Method("amct-best-distil", "amct_ext, BEST + DistillationLoss", _distilled(_BEST), kind="ours"),
    Method("amct-learned", "ulq_retrain", _amct(learned_scales=True), kind="option"),
    Method("amct-percentile", "range_search: PERCENTILE", _amct(range_search="PERCENTILE"), kind="option"),
    Method("amct-absolute", "range_search: ABSOLUTE_ERROR", _amct(range_search="ABSOLUTE_ERROR"), kind="option"),
    Method("amct-output", "range_search: OUTPUT", _amct(range_search="OUTPUT"), kind="option"),
    Method("amct-start", "scale_start: LEAST_SQUARES", _amct(scale_start="LEAST_SQUARES"), kind="option"),
    Method("amct-l2", "importance: GROUP_L2", _amct(importance="GROUP_L2"), kind="option"),
    Method("amct-taylor", "importance: GATE_TAYLOR", _amct(importance="GATE_TAYLOR"), kind="option"),
    Method("amct-sr-ste", "mask_gradient: SR_STE", _amct(mask_gradient="SR_STE"), kind="option"),
    Method("amct-permute", "permute_channels", _amct(permute_channels="true"), kind="option"),
    Method("amct-distil", "DistillationLoss", _distilled(_amct()), kind="option"),
)
METHODS = {method.name: method for method in _LIST}
