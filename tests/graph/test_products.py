"""Products inside of forwards that are not torch's: which are found, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import custom_forwards as own
from support.models.net_of_function import Net
from torch import nn

from amct_ext.graph.inputs import Inputs
from amct_ext.graph.products import find_products
from amct_ext.graph.trace import trace
from amct_ext.layers.product_call import Product


@pytest.mark.parametrize("kind", own.KINDS)
def test_each_kind_is_found(kind: str) -> None:
    net, x = own.net_and_input(kind)
    graph = trace(net, x)
    product = graph.products["layer"]
    assert isinstance(product, Product)
    wanted = {"transposed": "ConvTranspose2d"}.get(kind, "Conv2d" if kind in own.IMAGES else "Linear")
    assert product.kind == wanted and product.weight_is_in_out == (kind in ("columns", "matmul"))
    assert product.weight_is_parameter == (
        kind not in ("standardised", "scaled", "merged", "matmul", "no_class", "chunked")
    )
    assert graph.product_nodes()["layer"].op in ("convolution", "addmm", "mm")
    order = [name for name in graph.layer_order() if name in ("first", "layer", "head")]
    assert order == ["first", "layer", "head"]
    traits = graph.traits(net)["layer"]
    assert traits.type == wanted and traits.quantizable and not traits.sparse_prunable


def test_a_batch_norm_behind_a_product_is_its_own() -> None:
    for kind, pairs in (
        ("standardised", {"first": "norm", "layer": "after"}),
        ("transposed", {"first": "norm"}),
        ("cast", {}),
    ):
        net, x = own.net_and_input(kind)
        assert trace(net, x).conv_bn() == pairs


@pytest.mark.parametrize(
    ("before", "fed"),
    [(torch.relu, True), (torch.tanh, False), (lambda x: F.pad(torch.relu(x), (1, 1), value=-1.0), False)],
)
def test_a_relu_in_front_of_the_padding(before, fed: bool) -> None:
    net = Net(lambda net, x: net.conv(before(x)), conv=own.SamePadConv(3, 4, 3))
    assert trace(net, torch.randn(1, 3, 6, 6)).fed_by_relu("conv") is fed


def test_modules_are_left_as_they_were() -> None:
    net, x = own.net_and_input("scaled")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.random.get_rng_state()
    assert set(find_products(net, Inputs((x,)))) == {"layer"}
    assert not any("forward" in vars(module) for module in net.modules()) and net.training
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_what_is_not_looked_at() -> None:
    """Plain layers, look-ups, modules that hold no weight or do not run, forwards put on an instance."""
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LSTM(8, 8))
    assert trace(net, torch.randint(0, 10, (2, 3))).products == {}
    odd = Net(lambda net, x: net.fc(x), fc=nn.Linear(8, 8), idle=own.Columns(8, 8))
    odd.fc.forward = odd.fc.forward
    assert trace(odd, torch.randn(2, 8)).products == {}


def test_a_training_mode_that_cannot_run_is_not_counted() -> None:
    class Strict(own.Net):
        def forward(self, x):
            if self.training:
                raise RuntimeError("no training here")
            return super().forward(x)

    assert isinstance(trace(Strict(own.Columns(8, 8), False), torch.randn(4, 12)).products["layer"], Product)


class _Sized(nn.Linear):
    def forward(self, x, size):
        return F.linear(x, self.weight[: len(size)])


@pytest.mark.parametrize(
    ("run", "layer", "reason"),
    [
        (lambda net, x: net.layer(net.layer(x)), own.CastingLinear(8, 8), "called 2 times"),
        (lambda net, x: net.layer(x, {1, 2}), _Sized(8, 8), "more than tensors and numbers"),
        (lambda net, x: net.layer(x), type("Conv1x1", (nn.Linear,), {
            "forward": lambda self, x: F.conv1d(x.unsqueeze(-1), self.weight.unsqueeze(-1)).squeeze(-1)})(8, 8),
         "computes no Linear"),
        (lambda net, x: net.layer(x), type("Wide", (own.Columns,), {
            "forward": lambda self, x: torch.addmm(self.bias.expand(x.shape[0], -1), x, self.weight)})(8, 8),
         "more than one number per channel"),
    ],
    ids=["twice", "arguments", "other", "bias"],
)  # fmt: skip
def test_why_a_product_is_none(run, layer: nn.Module, reason: str) -> None:
    found = trace(Net(run, layer=layer), torch.randn(4, 8)).products["layer"]
    assert isinstance(found, str) and reason in found
