"""Everything that is compared: float networks, amct_ext and its aids, other toolkits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from torch import Tensor, nn

from benchmarks.accuracy.amct import Aids, compress
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import Setting
from benchmarks.accuracy.trainee import Trainee

Prepare = Callable[[nn.Module, Task, Setting], Trainee]


@dataclass(frozen=True)
class Method:
    """``package``: what must be installed, None for nothing; ``kind``: which rows of the tables it belongs to."""

    name: str
    label: str
    prepare: Prepare
    package: str | None = None
    kind: Literal["float", "peer", "ours", "aid"] = "peer"

    def installed(self) -> str | None:
        """The version of the package; None where it is missing."""
        if self.package is None:
            return ""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _float(model: nn.Module, task: Task, setting: Setting, trained: bool) -> Trainee:
    return Trainee(model, trained=trained)


def _distilled(prepare: Prepare) -> Prepare:
    """Half of the loss from the float network that the run starts with."""

    def prepare_distilled(model: nn.Module, task: Task, setting: Setting) -> Trainee:
        from amct_ext import DistillationLoss

        teacher = copy.deepcopy(model)
        trainee = prepare(model, task, setting)
        distillation = DistillationLoss(trainee.model, teacher, distance=task.distillation)

        def loss_of(x: Tensor, output: Tensor, target: Tensor) -> Tensor:
            return distillation(task.loss(output, target))

        trainee.loss_of = loss_of
        return trainee

    return prepare_distilled


def _ours(**aids: object) -> Prepare:
    chosen = Aids(**aids)  # type: ignore[arg-type]
    return functools.partial(compress, aids=chosen)


def _peer(module: str, function: str = "prepare", **options: object) -> Prepare:
    """A function of a peer's module, imported when it is called."""

    def prepare(model: nn.Module, task: Task, setting: Setting) -> Trainee:
        import importlib

        peer = importlib.import_module(f"benchmarks.accuracy.peers.{module}")
        trainee: Trainee = getattr(peer, function)(model, task, setting, **options)
        return trainee

    return prepare


_BEST = _ours(profile="BEST")
_LIST = (
    Method("float", "float", functools.partial(_float, trained=False), kind="float"),
    Method("float-budget", "float + budget", functools.partial(_float, trained=True), kind="float"),
    Method("modelopt", "ModelOpt", _peer("modelopt"), "nvidia-modelopt"),
    Method("brevitas", "Brevitas", _peer("brevitas"), "brevitas"),
    Method("nncf", "NNCF", _peer("nncf"), "nncf"),
    Method("pt2e", "torchao PT2E", _peer("torchao", "prepare_pt2e"), "torchao"),
    Method("torchao", "torchao, linear layers", _peer("torchao", "prepare_linear"), "torchao"),
    Method("pruning-l2", "Torch-Pruning, group L2", _peer("torch_pruning"), "torch-pruning"),
    Method("pruning-taylor", "Torch-Pruning, Taylor", _peer("torch_pruning", importance="taylor"), "torch-pruning"),
    Method("amct", "amct_ext, default", _ours(), kind="ours"),
    Method("amct-best", "amct_ext, BEST", _BEST, kind="ours"),
    Method("amct-best-learned", "amct_ext, BEST, ulq_retrain", _ours(profile="BEST", learned_scales=True), kind="ours"),
    Method("amct-best-distil", "amct_ext, BEST + DistillationLoss", _distilled(_BEST), kind="ours"),
    Method("amct-learned", "ulq_retrain", _ours(learned_scales=True), kind="aid"),
    Method("amct-percentile", "range_search: PERCENTILE", _ours(range_search="PERCENTILE"), kind="aid"),
    Method("amct-absolute", "range_search: ABSOLUTE_ERROR", _ours(range_search="ABSOLUTE_ERROR"), kind="aid"),
    Method("amct-output", "range_search: OUTPUT", _ours(range_search="OUTPUT"), kind="aid"),
    Method("amct-start", "scale_start: LEAST_SQUARES", _ours(scale_start="LEAST_SQUARES"), kind="aid"),
    Method("amct-l2", "importance: GROUP_L2", _ours(importance="GROUP_L2"), kind="aid"),
    Method("amct-taylor", "importance: GATE_TAYLOR", _ours(importance="GATE_TAYLOR"), kind="aid"),
    Method("amct-sr-ste", "mask_gradient: SR_STE", _ours(mask_gradient="SR_STE"), kind="aid"),
    Method("amct-permute", "permute_channels", _ours(permute_channels="true"), kind="aid"),
    Method("amct-distil", "DistillationLoss", _distilled(_ours()), kind="aid"),
)
METHODS = {method.name: method for method in _LIST}
