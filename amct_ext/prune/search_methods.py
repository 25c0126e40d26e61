"""How the ratio search measures and chooses: base classes for methods of the user's own, and the built-in ones."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.errors import ModelError
from amct_ext.graph.inputs import parse_inputs
from amct_ext.prune.cost import Cost

_log = logging.getLogger("amct_ext")
Sample = tuple[tuple[Any, ...], Tensor]


@dataclass(frozen=True)
class SearchGroup:
    """Channels that go together. `counts`: how many may go, from 0 up; `blocks`: equal blocks that lose alike."""

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    channels: int
    counts: tuple[int, ...]
    blocks: int = 1


class SensitivityBase(ABC):
    """How much the model suffers when a channel goes. Derive from it to bring a measure of your own."""

    @abstractmethod
    def get_sensitivity(
        self, model: nn.Module, groups: Sequence[SearchGroup], samples: Sequence[Sample]
    ) -> Sequence[Tensor]:
        """One score per channel of each group: a float tensor of shape (group.channels,), higher is worse to lose.

        `model` is a float copy in eval mode that may be changed; `samples` are `test_iteration` pairs (arguments,
        label) with one sample each.
        """


class SearchChannelBase(ABC):
    """Which channel counts to choose. Derive from it to bring an algorithm of your own."""

    @abstractmethod
    def channel_prune_search(
        self, groups: Sequence[SearchGroup], sensitivity: Sequence[Tensor], cost: Cost, compress_ratio: float
    ) -> Sequence[int]:
        """How many channels each group loses, each one of its `counts`.

        `cost(removed)` is the model's cost in bit operations, `cost.original` that of the whole model; their ratio is
        to reach `compress_ratio`.
        """


class TaylorLossSensitivity(SensitivityBase):
    """First-order estimate of the loss's change: L1 norm of weight * gradient per output channel, over all producers.

    The loss is the mean absolute difference of output and label; scores of several samples add up.
    """

    def get_sensitivity(
        self, model: nn.Module, groups: Sequence[SearchGroup], samples: Sequence[Sample]
    ) -> list[Tensor]:
        """See SensitivityBase. Errors: ModelError (the model returns no single tensor), InvalidDataError."""
        names = list(dict.fromkeys(name for group in groups for name in group.producers))
        model.requires_grad_(False)
        weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in names]
        scores = {name: torch.zeros(weight.shape[0]) for name, weight in zip(names, weights, strict=True)}
        for arguments, label in samples:
            with torch.enable_grad():
                output = parse_inputs(model, arguments).call(model)
                if not isinstance(output, Tensor):
                    raise ModelError(
                        f"the model returns a {type(output).__name__}, but TaylorLossSensitivity needs one tensor to "
                        "compare with the label; pass a sensitivity of your own, derived from SensitivityBase"
                    )
                gradients = torch.autograd.grad(nn.functional.l1_loss(output, label), weights, allow_unused=True)
            for name, weight, gradient in zip(names, weights, gradients, strict=True):
                if gradient is not None:  # else it does not matter to the output
                    scores[name] += (weight.detach() * gradient).flatten(1).float().abs().sum(1).cpu()
        return [torch.stack([scores[name] for name in group.producers]).sum(0) for group in groups]


class GreedySearch(SearchChannelBase):
    """Takes the step that costs the least sensitivity per bit operation saved, until the ratio is reached.

    Costs and ratio are those of the present widths at each step.
    """

    def channel_prune_search(
        self, groups: Sequence[SearchGroup], sensitivity: Sequence[Tensor], cost: Cost, compress_ratio: float
    ) -> list[int]:
        """See SearchChannelBase. A ratio that cannot be reached is told by a warning."""
        suffering = [_suffering(group, scores) for group, scores in zip(groups, sensitivity, strict=True)]
        stage = [0] * len(groups)  # places in group.counts
        removed = [0] * len(groups)
        present = cost(removed)
        offers: dict[int, tuple[float, int]] = {}  # group -> price and gain of its next step
        stale = set(range(len(groups)))
        while present * compress_ratio > cost.original:
            for index in stale:
                offers.pop(index, None)
                if stage[index] + 1 == len(groups[index].counts):
                    continue
                further = [*removed]
                further[index] = groups[index].counts[stage[index] + 1]
                saved = cost.touched(removed, index) - cost.touched(further, index)
                if saved > 0:
                    loss = suffering[index][stage[index] + 1] - suffering[index][stage[index]]
                    offers[index] = (loss / saved, saved)
            if not offers:
                _log.warning(
                    "compress_ratio %g cannot be reached, %.4g is the most that can go", compress_ratio,
                    cost.original / max(present, 1),
                )  # fmt: skip
                break
            best = min(offers, key=lambda index: (offers[index][0], index))
            present -= offers[best][1]
            stage[best] += 1
            removed[best] = groups[best].counts[stage[best]]
            stale = cost.related(best)
        return removed


def _suffering(group: SearchGroup, scores: Tensor) -> list[float]:
    """The score lost at each of the group's counts, the least important channels of each block going first."""
    ordered = scores.double().cpu().reshape(group.blocks, -1).sort(dim=1).values.cumsum(1).sum(0)
    return [0.0 if count == 0 else float(ordered[count // group.blocks - 1]) for count in group.counts]
