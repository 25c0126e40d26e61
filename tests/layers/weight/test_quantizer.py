"""The scale of a weight: which one a forward uses, and when a learned one is set."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.config.plan import WeightQuant
from amct_ext.layers.weight.quantizer import WeightQuantizer, gradient_factor

ADAPTIVE, LEARNED = WeightQuant("arq_retrain"), WeightQuant("ulq_retrain")
LEAST_SQUARES = WeightQuant("ulq_retrain", num_bits=4, least_squares=True)


def quantizer_of(plan: WeightQuant, weight: Tensor) -> WeightQuantizer:
    return WeightQuantizer(plan, weight, 0, gradient_factor(weight, plan))


def range_scale(weight: Tensor, bits: int = 8) -> Tensor:
    return ops.arq_fake_quantize(weight, bits, 0)[1]


def test_an_adaptive_scale_follows_the_weight_in_every_mode() -> None:
    weight = torch.randn(4, 6)
    quantizer = quantizer_of(ADAPTIVE, weight)
    assert quantizer.scale.isnan().all() and quantizer.ready
    for factor, training in ((1.0, True), (3.0, False)):
        y = quantizer.train(training)(factor * weight)
        assert torch.equal(quantizer.scale, range_scale(factor * weight))
        assert torch.equal(y, ops.arq_fake_quantize(factor * weight, 8, 0)[0])


def test_a_learned_scale_is_set_by_the_first_training_forward_alone() -> None:
    weight = torch.randn(4, 6)
    quantizer = quantizer_of(LEARNED, weight)
    y = quantizer.eval()(2 * weight)  # by the weight at hand
    assert torch.equal(y, ops.lsq_fake_quantize(2 * weight, range_scale(2 * weight), 8, 0))
    assert not quantizer.ready and torch.equal(quantizer.scale, range_scale(weight))
    quantizer.train()(3 * weight)
    assert quantizer.ready and quantizer.initialised == 1
    assert torch.equal(quantizer.scale, range_scale(3 * weight))
    quantizer(weight)
    assert torch.equal(quantizer.scale, range_scale(3 * weight))


@pytest.mark.parametrize("training", [True, False])
def test_a_scale_that_an_average_of_parameters_brought_counts_as_set(training: bool) -> None:
    weight = torch.randn(4, 6)
    quantizer = quantizer_of(LEARNED, weight).train(training)
    averaged = 1.1 * quantizer.scale.detach()
    quantizer.scale.data.copy_(averaged)
    quantizer(weight)
    assert quantizer.ready and torch.equal(quantizer.scale, averaged)
    assert bool(quantizer.initialised) is training


def test_a_lost_channel_gets_the_scale_of_its_range_back() -> None:
    weight = torch.randn(4, 6)
    quantizer = quantizer_of(LEARNED, weight)
    quantizer(weight)
    with torch.no_grad():
        quantizer.scale[1] = 1e6  # all of the channel rounds to zero
    assert torch.equal(quantizer.current_scale(weight), range_scale(weight))
    assert quantizer.scale[1] == 1e6
    y = quantizer(weight)
    assert torch.equal(quantizer.scale, range_scale(weight)) and y[1].abs().sum() > 0


def test_what_was_loaded_leaves_as_it_came() -> None:
    weight = torch.randn(4, 6)
    trained = quantizer_of(LEARNED, weight)
    trained(weight)
    state = copy.deepcopy(trained.state_dict())
    state["scale"][1] = 1e6
    loaded = quantizer_of(LEARNED, weight)
    loaded.load_state_dict(state)
    loaded.repair_for_state(weight)
    assert loaded.scale[1] == 1e6
    loaded.scale.data.add_(0)
    with torch.no_grad():
        loaded.scale.mul_(1)  # a step of the optimizer
    loaded.repair_for_state(weight)
    assert torch.equal(loaded.scale[1], range_scale(weight)[1])


def test_least_squares_scales_are_those_of_the_search() -> None:
    weight = torch.randn(4, 60)
    quantizer = quantizer_of(LEAST_SQUARES, weight)
    quantizer(weight)
    assert torch.equal(quantizer.scale, ops.search_weight_scale(weight, 4, 0))


@pytest.mark.parametrize(
    ("shape", "channel_wise", "count"),
    [((4, 6), True, 6), ((4, 6), False, 6), ((4, 3, 5), False, 3), ((4, 3, 5), True, 15)],
)
def test_the_gradient_counts_as_amct_does(shape: tuple[int, ...], channel_wise: bool, count: int) -> None:
    plan = WeightQuant("ulq_retrain", channel_wise=channel_wise)
    assert gradient_factor(torch.zeros(shape), plan) == pytest.approx((count * 127) ** -0.5)
