"""Channel pruning by Torch-Pruning, at its best setting that works."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from amct_ext.graph.run import tensors_in
from benchmarks.coverage.amct_ext_pruner import describe, other_outputs, smaller
from benchmarks.coverage.layers import Layers
from benchmarks.coverage.results import Pruned

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_HEAD_SIZES = ("head_dim", "attention_head_size", "dim_head")
_WIDTHS = ("all_head_size", "attn_dim", "inner_dim")
_QUERIES = ("query", "q_proj", "q_lin", "to_q", "q")
_KEYS = ("key", "k_proj", "k_lin", "to_k", "k", "value", "v_proj", "v_lin", "to_v", "v")


def prune(model: nn.Module, inputs: tuple[Any, ...], layers: Layers, whole: int, ratio: float) -> Pruned:
    """With heads made known to it; where that fails with the layers of attention left whole."""
    attention = any(map(_heads, model.modules()))
    failures: list[str] = []
    for keep_attention in (False, True) if attention else (False,):
        candidate = copy.deepcopy(model)
        began = time.perf_counter()
        try:
            _prune(candidate, inputs, layers, ratio, keep_attention)
        except Exception as error:
            failures.append(describe(error))
            continue
        seconds = time.perf_counter() - began
        wrong = other_outputs(model, candidate, inputs)
        if wrong:
            failures.append(wrong)
            continue
        result = smaller(model, candidate, inputs, layers, whole, seconds)
        return replace(result, note="attention left whole" if keep_attention else "")
    return Pruned(error=failures[0])


def _heads(module: nn.Module) -> int:
    """Number of heads of a module that looks like attention, 0 for any other."""
    if not (_parts(module, ("qkv",)) or (_parts(module, _QUERIES) and _parts(module, _KEYS))):
        return 0
    return next((value for name in _HEADS if isinstance(value := getattr(module, name, None), int)), 1)


def _parts(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    found = (getattr(module, name, None) for name in names)
    return [part for part in found if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv1d))]


def _prune(model: nn.Module, inputs: tuple[Any, ...], layers: Layers, ratio: float, keep_attention: bool) -> None:
    import torch_pruning as tp

    modules = dict(model.named_modules())
    attention = [module for module in model.modules() if _heads(module)]
    ignored = [modules[name] for name in layers.outputs]
    if keep_attention:
        ignored += [
            part for module in attention for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)
        ]
    heads = {part: _heads(module) for module in attention for part in _parts(module, ("qkv", *_QUERIES, *_KEYS))}
    pruner = tp.pruner.BasePruner(
        model.eval(),
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={} if keep_attention else heads,
        forward_fn=lambda network, arguments: network(*arguments),
        output_transform=_to_trace,
    )
    pruner.step()
    for module in attention:
        _adapt(module)


def _to_trace(result: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(result) if tensor.requires_grad]


def _adapt(module: nn.Module) -> None:
    """Sizes that a module of attention keeps in attributes, as Torch-Pruning's examples set them."""
    heads = _heads(module)
    for total in _widths(module):
        for name in _HEAD_SIZES:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, total // heads)
        for name in _WIDTHS:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, total)


def _widths(module: nn.Module) -> Iterator[int]:
    """Channels of the queries."""
    for part in _parts(module, ("qkv",)):
        yield (part.out_features if isinstance(part, nn.Linear) else int(part.out_channels)) // 3  # type: ignore[arg-type]
        return
    for part in _parts(module, _QUERIES)[:1]:
        yield part.out_features if isinstance(part, nn.Linear) else int(part.out_channels)  # type: ignore[arg-type]
