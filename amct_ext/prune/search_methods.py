"""How the ratio search measures and chooses: AMCT's interface for methods of the user's own, and the built-in ones."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import output_axis
from amct_ext.errors import InputDataError, ModelError
from amct_ext.graph.inputs import Inputs
from amct_ext.prune.cost import Cost
from amct_ext.prune.gate_taylor import gate_taylor
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.search_space import (
    PruneConfig,
    SearchGraph,
    read_group,
    read_scores,
    removable,
    split_samples,
    update_graph_info,
    write_scores,
)

_log = logging.getLogger("amct_ext")
_LOSS_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, UserWarning)
_BROADCAST = "Using a target size"  # how torch's losses begin to warn of a label that they broadcast


class SensitivityBase(ABC):
    """How much the model loses when a channel is removed. Derive your own measures from it."""

    @abstractmethod
    def setup_initialization(
        self, graph_tuple: tuple[SearchGraph, dict[str, dict[str, Any]]], input_data: Any, test_iteration: int,
        output_nodes: Any = None,
    ) -> None:  # fmt: skip
        """Called first, once. `graph_tuple`: (graph, graph_info).

        `graph.model` is a float copy in eval mode that may be changed, `graph.nodes` are its layers in execution order;
        `graph_info` is described at `SearchChannelBase`. `input_data`: what the user gave, [data, label], of which the
        first `test_iteration` samples are meant. `output_nodes`: None (AMCT's TensorFlow half uses it); the parameter
        may be left out.
        """

    @abstractmethod
    def get_sensitivity(self, search_records: Any) -> None:
        """Write a score per channel into each record, higher is worse to lose.

        `search_records`: AMCT's messages, one per group of coupled channels, with `producer` and `consumer` nodes of a
        `name` and attributes. The scores are the attribute "sensitivity" (FLOATS) of the first producer.
        """


class SearchChannelBase(ABC):
    """Which channels to remove. Derive your own algorithms from it."""

    @abstractmethod
    def channel_prune_search(
        self, graph_info: dict[str, dict[str, Any]], search_records: Any, prune_config: PruneConfig
    ) -> Mapping[str, Sequence[int]]:
        """Each producer's channels, 1 for one that stays and 0 for one to remove; producers left out lose nothing.

        `graph_info`: per convolution and Linear its input and output channels ("cin", "cout", "ori_cout") and its
        "bitops" per sample. `search_records`: with the attributes "sensitivity" (FLOATS) and "bitops" (FLOAT, of one
        channel) at each first producer. `prune_config`: (compress_ratio, ascend_optimized, max_prune_ratio). The ratio
        is that of bit operations before and after.
        """

    def update_graph(
        self, prune_channel_num: Mapping[int, int], graph_info: dict[str, dict[str, Any]], search_records: Any
    ) -> None:
        """Bring `graph_info` and the records' "bitops" up to date: record number -> how many more channels it lost."""
        update_graph_info(prune_channel_num, graph_info, search_records)


class TaylorLossSensitivity(SensitivityBase):
    """First-order estimate of the loss's change: L1 norm of weight * gradient per output channel, over all producers.

    The loss is the mean absolute difference of output and label where they have one shape, and the cross-entropy where
    the labels are class numbers (integers without the output's axis 1); any other label is refused, for it would be
    broadcast. `set_loss_func` gives another one. Scores of several samples add up.
    """

    def __init__(self) -> None:
        self.loss_func: Callable[[Any, Any], Tensor] = _default_loss

    def set_loss_func(self, loss_func: Callable[[Any, Any], Tensor] | None = None) -> None:
        """Measure with ``loss_func(output, label)``, a scalar; None: as at the start. Errors: TypeError."""
        if loss_func is not None and not callable(loss_func):
            raise TypeError(f"loss_func must be callable with output and label, not {type(loss_func).__name__}")
        self.loss_func = _default_loss if loss_func is None else loss_func

    def setup_initialization(
        self, graph_tuple: tuple[SearchGraph, dict[str, dict[str, Any]]], input_data: Any, test_iteration: int,
        output_nodes: Any = None,
    ) -> None:  # fmt: skip
        """See SensitivityBase. Errors: InputDataError."""
        self.graph, self.graph_info = graph_tuple
        self._samples = split_samples(self.graph.model, input_data, test_iteration)

    def get_sensitivity(self, search_records: Any) -> None:
        """See SensitivityBase. Errors: ModelError, InputDataError (what the model or the loss rejects)."""
        model = self.graph.model
        groups = [read_group(record) for record in search_records]
        names = list(dict.fromkeys(member.name for group in groups for member in group.producers))
        model.requires_grad_(False)
        weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in names]
        axes = {name: output_axis(model.get_submodule(name)) for name in names}
        scores = {name: torch.zeros(weight.shape[axes[name]]) for name, weight in zip(names, weights, strict=True)}
        for inputs, label in self._samples:
            with torch.enable_grad():
                gradients = torch.autograd.grad(self._loss(model, inputs, label), weights, allow_unused=True)
            for name, weight, gradient in zip(names, weights, gradients, strict=True):
                if gradient is not None:  # else it does not matter to the output
                    changes = (weight.detach() * gradient).movedim(axes[name], 0)
                    scores[name] += changes.flatten(1).float().abs().sum(1).cpu()
        for record, group in zip(search_records, groups, strict=True):
            write_scores(record, torch.stack([scores[member.name] for member in group.producers]).sum(0))

    def _loss(self, model: nn.Module, inputs: Inputs, label: Tensor) -> Tensor:
        try:
            output = inputs.copied().call(model)  # a model may write into what it is given
            if isinstance(output, Tensor):
                label = label.to(output.device)
            elif self.loss_func is _default_loss:
                raise ModelError(
                    f"the model returns a {type(output).__name__}, but {type(self).__name__} needs one tensor to "
                    "compare with the label; give it a loss of your own by set_loss_func"
                )
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=_BROADCAST)
                loss = self.loss_func(output, label)
        except (ModelError, InputDataError):
            raise
        except _LOSS_FAILURES as error:
            raise InputDataError(
                f"the model or the loss rejects input_data, one sample with the label {tuple(label.shape)}: {error}"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputDataError(f"the loss must be one number that depends on the model's weights, not {shape}")
        if not bool(torch.isfinite(loss)):
            raise InputDataError("the loss of a sample is NaN or Inf: check data, labels and weights")
        return loss


class GateTaylorSensitivity(TaylorLossSensitivity):
    """First-order estimate of the loss's change when a channel is switched off before all layers that read it.

    The mean over samples of its absolute value: what `importance: GATE_TAYLOR` ranks by, which the written
    configuration asks for too. Losses as for TaylorLossSensitivity. Source: Molchanov et al. 2019, gates.
    """

    def get_sensitivity(self, search_records: Any) -> None:
        """See SensitivityBase. Errors: ModelError, InputDataError (what the model or the loss rejects)."""
        model = self.graph.model
        groups = [read_group(record) for record in search_records]

        def losses(model: nn.Module) -> Iterator[Tensor]:
            return (self._loss(model, inputs, label) for inputs, label in self._samples)

        for record, scores in zip(search_records, gate_taylor(model, groups, losses), strict=True):
            write_scores(record, scores)


def _default_loss(output: Tensor, label: Tensor) -> Tensor:
    if label.shape == output.shape:
        return nn.functional.l1_loss(output, label)
    shape = (*output.shape[:1], *output.shape[2:])
    classes = output.shape[1] if output.dim() > 1 else 1
    integers = not (label.is_floating_point() or label.is_complex() or label.dtype is torch.bool)
    if integers and classes > 1 and tuple(label.shape) == shape:
        if bool((label < 0).any()) or bool((label >= classes).any()):
            raise InputDataError(f"label: class numbers must lie in 0..{classes - 1}, not {int(label.max())}")
        return nn.functional.cross_entropy(output, label.long())
    raise InputDataError(
        f"label: a sample's label has the shape {list(label.shape)} ({label.dtype}), its output {list(output.shape)}; "
        f"give labels of the output's shape, class numbers (integers of shape {list(shape)}), or a loss of your own by "
        "set_loss_func"
    )


class GreedySearch(SearchChannelBase):
    """Takes the step that costs the least sensitivity per bit operation saved, until the ratio is reached.

    Costs and ratio are those of the present widths at each step. Only counts that create arrives at from the written
    ratio are taken: multiples of 16 stay where `ascend_optimized`, subgroups lose equally many.
    """

    def channel_prune_search(
        self, graph_info: dict[str, dict[str, Any]], search_records: Any, prune_config: PruneConfig
    ) -> dict[str, list[int]]:
        """See SearchChannelBase. A ratio that cannot be reached is logged as a warning. Errors: ValueError."""
        compress_ratio, ascend, max_ratio = prune_config
        groups = [read_group(record) for record in search_records]
        scores = [read_scores(record, group) for record, group in zip(search_records, groups, strict=True)]
        foreign = [name for name, entry in graph_info.items() if "work" not in entry]
        if foreign:
            raise ValueError(f"graph_info of '{foreign[0]}' has no 'work': it is not that of auto_channel_prune_search")
        cost = Cost({name: entry["work"] for name, entry in graph_info.items()}, groups)
        removed = _greedy(
            groups, scores, [removable(group, ascend, max_ratio) for group in groups], cost, compress_ratio
        )
        return {
            member.name: _keep_mask(group, values, count)
            for group, values, count in zip(groups, scores, removed, strict=True)
            for member in group.producers
        }


def _greedy(
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    counts: Sequence[tuple[int, ...]],
    cost: Cost,
    compress_ratio: float,
) -> list[int]:
    lost = [_sensitivity_lost(*each) for each in zip(groups, scores, counts, strict=True)]
    stage = [0] * len(groups)  # indices into counts
    removed = [0] * len(groups)
    present = cost(removed)
    candidates: dict[int, tuple[float, int]] = {}  # group -> its next step: cost per saved operation, operations saved
    stale = set(range(len(groups)))
    while present * compress_ratio > cost.original:
        for index in stale:
            candidates.pop(index, None)
            if stage[index] + 1 == len(counts[index]):
                continue
            next_counts = [*removed]
            next_counts[index] = counts[index][stage[index] + 1]
            saved = cost.cost_of_group(removed, index) - cost.cost_of_group(next_counts, index)
            if saved > 0:
                loss = lost[index][stage[index] + 1] - lost[index][stage[index]]
                candidates[index] = (loss / saved, saved)
        if not candidates:
            _log.warning(
                "compress_ratio %g cannot be reached, %.4g is the most that can go", compress_ratio,
                cost.original / max(present, 1),
            )  # fmt: skip
            break
        best = min(candidates, key=lambda index: (candidates[index][0], index))
        present -= candidates[best][1]
        stage[best] += 1
        removed[best] = counts[best][stage[best]]
        stale = cost.affected_groups(best)
    return removed


def _sensitivity_lost(group: ChannelGroup, scores: Tensor, counts: Sequence[int]) -> list[float]:
    """The score lost at each of the counts, the least important channels of each subgroup going first."""
    num_subgroups = group.num_equal_subgroups or 1
    ordered = scores.double().reshape(num_subgroups, -1).sort(dim=1).values.cumsum(1).sum(0)
    return [0.0 if count == 0 else float(ordered[count // num_subgroups - 1]) for count in counts]


def _keep_mask(group: ChannelGroup, scores: Tensor, count: int) -> list[int]:
    num_subgroups = group.num_equal_subgroups or 1
    kept = torch.ones(num_subgroups, group.count // num_subgroups, dtype=torch.int64)
    order = scores.reshape(num_subgroups, -1).argsort(dim=1, stable=True)
    kept.scatter_(1, order[:, : count // num_subgroups], 0)
    return [int(value) for value in kept.flatten()]
