"""amct_ext itself: its default, `profile: BEST`, and the options one by one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import amct_ext as amct
from benchmarks.accuracy.prepared_model import CALIBRATION_BATCHES, PreparedModel, UnsupportedError
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import Setting
from benchmarks.accuracy.training import ParamGroup

_MASK_STEPS = 20  # steps between refreshes of 2:4 masks
_SCALE_LR = 0.003  # of learned weight scales, relative to the weights' rate


@dataclass(frozen=True)
class Options:
    """Settings beyond AMCT's; None leaves them to the profile."""

    profile: str | None = None
    learned_scales: bool = False
    range_search: str | None = None
    scale_start: str | None = None
    importance: str | None = None
    mask_gradient: str | None = None
    permute_channels: str | None = None
    float_recurrent: bool = False

    def apply_to(self, model: nn.Module, setting: Setting) -> bool:
        """Whether each of the options changes something for this network and setting."""
        applies = {
            "profile": True,
            "learned_scales": not setting.prune,
            "range_search": not setting.prune,
            "scale_start": setting.weight_bits == 4,
            "importance": setting.prune > 0,
            "mask_gradient": setting.sparse,
            "permute_channels": setting.sparse,
            "float_recurrent": any(isinstance(module, (nn.LSTM, nn.GRU)) for module in model.modules()),
        }
        chosen = [field.name for field in fields(self) if getattr(self, field.name)]
        return all(applies[name] for name in chosen)


def _field(name: str, value: str | None) -> str:
    return f" {name}: {value}" if value else ""


def configuration(task: Task, setting: Setting, options: Options) -> str:
    """The text of the configuration file."""
    data = f"retrain_data_quant_config {{ ulq_quantize {{{_field('range_search', options.range_search)} }} }}"
    rule = "ulq_retrain" if options.learned_scales else "arq_retrain"
    start = _field("scale_start", options.scale_start)

    def weight(bits: int) -> str:
        return f"retrain_weight_quant_config {{ {rule} {{ dst_type: INT{bits}{start} }} }}"

    lines = [f"batch_num: {CALIBRATION_BATCHES}", data, weight(setting.weight_bits)]
    if options.profile:
        lines.append(f"profile: {options.profile}")
    if setting.sparse:
        how = f"update_freq: {_MASK_STEPS}{_field('mask_gradient', options.mask_gradient)}"
        how += _field("permute_channels", options.permute_channels)
        lines.append(f"prune_config {{ n_out_of_m_pruner {{ l1_selective_prune {{ {how} }} }} }}")
    if setting.prune:
        how = f"prune_ratio: {setting.prune} ascend_optimized: false{_field('importance', options.importance)}"
        lines.append(f"prune_config {{ filter_pruner {{ balanced_l2_norm_filter_prune {{ {how} }} }} }}")
    if options.float_recurrent:
        lines += [f'quant_skip_types: "{kind}"' for kind in ("LSTM", "GRU")]
    for name in task.keep_8_bits if setting.weight_bits == 4 else ():
        lines.append(f'override_layer_configs {{ layer_name: "{name}" {data} {weight(8)} }}')
    return "\n".join(lines) + "\n"


def param_groups(model: nn.Module, lr: float) -> list[ParamGroup]:
    """Clips at the weights' rate, learned scales at 0.003 of it, both without decay."""
    weights, clips, scales = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("weight_quant.scale"):
            scales.append(parameter)
        elif ".act_quant." in name or ".hidden_quant." in name:
            clips.append(parameter)
        else:
            weights.append(parameter)
    groups: list[ParamGroup] = [{"params": weights, "lr": lr}]
    if clips:
        groups.append({"params": clips, "lr": lr, "weight_decay": 0.0})
    if scales:
        groups.append({"params": scales, "lr": lr * _SCALE_LR, "weight_decay": 0.0})
    return groups


def _loss_for_pruning(task: Task, setting: Setting, options: Options) -> dict[str, Any]:
    """The argument of create that GATE_TAYLOR takes, and BEST where it prunes: losses of the calibration batches."""
    if not setting.prune or (options.importance != "GATE_TAYLOR" and options.profile != "BEST"):
        return {}
    batches = task.labelled_calibration(CALIBRATION_BATCHES)
    return {"pruning_loss": lambda model: (task.loss(model(x), y) for x, y in batches)}


def compress(model: nn.Module, task: Task, setting: Setting, options: Options) -> PreparedModel:
    """Compressed, and calibrated in training forwards: a pruned network has no statistics of its own yet."""
    if not options.apply_to(model, setting):
        raise UnsupportedError("changes nothing for this network and setting")
    with tempfile.TemporaryDirectory() as folder:
        config, record = Path(folder) / "compression.cfg", Path(folder) / "record.txt"
        config.write_text(configuration(task, setting, options))
        paths, loss = (str(config), str(record)), _loss_for_pruning(task, setting, options)
        model = amct.create_compressed_retrain_model(model.eval(), task.example(), *paths, **loss)
        model.train()
        with torch.no_grad():
            for batch in task.calibration(CALIBRATION_BATCHES):
                model(batch)
    return PreparedModel(model, param_groups(model, task.budget.lr))
