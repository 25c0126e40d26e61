"""Torch-Pruning chooses and removes the channels; what is left is quantised by amct_ext."""

from __future__ import annotations

from torch import nn

from benchmarks.accuracy.amct import Options, compress
from benchmarks.accuracy.prepared_model import CALIBRATION_BATCHES, PreparedModel, UnsupportedError
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import SETTINGS, Setting


def _prune(model: nn.Module, task: Task, ratio: float, importance: str) -> None:
    """In place, the same share of the channels in every group."""
    import torch_pruning as tp

    ranking = tp.importance.GroupTaylorImportance() if importance == "taylor" else None
    pruner = tp.pruner.BasePruner(
        model.eval(),
        task.example(),
        importance=ranking or tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.get_submodule(task.classifier)],
    )
    if ranking is not None:
        for x, y in task.labelled_calibration(CALIBRATION_BATCHES):
            task.loss(model(x), y).backward()
    pruner.step()
    model.zero_grad(set_to_none=True)


def prepare(
    model: nn.Module, task: Task, setting: Setting, importance: str = "l2", profile: str | None = None
) -> PreparedModel:
    """Pruned by the group's L2 norm or the first-order Taylor term, then quantised by the default or ``profile``."""
    if not setting.prune:
        raise UnsupportedError("it prunes only")
    _prune(model, task, setting.prune, importance)
    return compress(model, task, SETTINGS["int8"], Options(profile=profile))
