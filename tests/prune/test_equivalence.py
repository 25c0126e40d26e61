"""The pruned model beside the unpruned one in which removed channels have no influence."""

from __future__ import annotations

import copy

import pytest
import torch
from support.checks.planned_channels import planned
from support.models.net_of_function import Net, conv, image
from torch import nn

from amct_ext.graph.inputs import parse_inputs
from amct_ext.prune.channels import apply_channels, removal_of
from amct_ext.prune.equivalence import first_divergence, largest_error, run_masked, run_pruned


def prepared(net, data):
    net.eval()
    found, records = planned(net, data, ratio=0.5)
    smaller = copy.deepcopy(net)
    removed_mask = found.removed_mask(records, net)
    assert removal_of(smaller, found, records, removed_mask).apply() == ""
    return found, records, smaller, parse_inputs(net, data), removed_mask


def test_masked_is_the_model_with_zeroed_weights():
    torch.manual_seed(0)
    net, data = nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 2)), image()
    found, records, _, inputs, removed_mask = prepared(net, data)
    by_hand = copy.deepcopy(net)
    with torch.no_grad():
        by_hand[2].weight[:, list(records[0].producers[0].prune_index)] = 0
        torch.testing.assert_close(
            run_masked(net, inputs, found, removed_mask)[1][0], by_hand(data), rtol=1e-6, atol=1e-6
        )


def test_a_layer_that_is_called_by_keyword_is_masked():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(input=m.a(x).sigmoid()), a=conv(3, 8), out=conv(8, 2))
    found, records, smaller, inputs, removed_mask = prepared(net, image())
    _, wanted = run_masked(net, inputs, found, removed_mask)
    assert largest_error(run_pruned(smaller, inputs, found, removed_mask)[1], wanted) < 1e-5
    assert apply_channels(net, found, records, image()) == records and net.a.out_channels == 4


@pytest.mark.parametrize(
    ("draw", "comparable"),
    [
        (lambda y: torch.nn.functional.dropout(y, 0.5, training=True), False),
        (lambda y: y + torch.randn_like(y), False),
        (lambda y: y + torch.rand(y.shape[0], 1, 1, 1), True),  # as many numbers in both models
    ],
    ids=["dropout", "noise", "per sample"],
)
def test_random_numbers_for_removed_channels_are_not_compared(draw, comparable):
    """Dropout in evaluation (Monte Carlo): the smaller model draws fewer numbers, and so others."""
    torch.manual_seed(0)
    net, data = Net(lambda m, x: m.out(draw(m.a(x))), a=conv(3, 8), out=conv(8, 2)), image()
    found, records, _, inputs, removed_mask = prepared(net, data)
    assert run_masked(net, inputs, found, removed_mask)[0].is_comparable() is comparable
    assert apply_channels(net, found, records, data) == records and net.a.out_channels == 4


def test_statistics_leave_out_what_is_gone():
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.randn(3, 4)
    found, records, _, inputs, removed_mask = prepared(net, data)
    keep = [index for index in range(8) if index not in records[0].producers[0].prune_index]
    with torch.no_grad():
        y = nn.functional.layer_norm(net[0](data)[:, keep], (4,), net[1].weight[keep], net[1].bias[keep])
        wanted = y @ net[2].weight[:, keep].T + net[2].bias
    torch.testing.assert_close(run_masked(net, inputs, found, removed_mask)[1][0], wanted, rtol=1e-5, atol=1e-6)


def test_the_node_that_computes_something_else_is_named():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(m.bn(m.a(x)).relu()), a=conv(3, 8), bn=nn.BatchNorm2d(8), out=conv(8, 2))
    found, _, smaller, inputs, removed_mask = prepared(net, image())
    with torch.no_grad():
        smaller.bn.bias += 1
    pruned, outputs, difference = run_pruned(smaller, inputs, found, removed_mask, sums=True)
    masked, wanted = run_masked(net, inputs, found, removed_mask, sums=True)
    assert difference is None and largest_error(outputs, wanted) > 1e-2
    parted = first_divergence(pruned, masked)
    assert parted.node is not None and parted.node.name == "bn" and "computes something else" in parted.reason


def test_a_forward_that_fails_names_the_operator():
    net = Net(lambda m, x: m.out(m.a(x).view(2, 8, 36).unflatten(2, (6, 6))), a=conv(3, 8), out=conv(8, 2))
    found, _, smaller, inputs, removed_mask = prepared(net, image())
    _, outputs, difference = run_pruned(smaller, inputs, found, removed_mask)
    assert outputs == [] and difference is not None
    assert difference.reason.startswith("/View (view) fails: RuntimeError: shape")


def test_a_shape_that_is_wrong_is_named():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(m.a(x).mean((2, 3))), a=conv(3, 8), out=nn.Linear(8, 2))
    found, _, smaller, inputs, removed_mask = prepared(net, image())
    smaller.a.stride = (2, 2)
    assert (
        "a (Conv2d) has shape [2, 4, 3, 3], not [2, 4, 6, 6]"
        in run_pruned(smaller, inputs, found, removed_mask)[2].reason
    )


@pytest.mark.parametrize(
    ("got", "wanted", "error"),
    [
        ([torch.tensor([1.0, 2])], [torch.tensor([1.0, 4])], 0.5),
        ([torch.zeros(2)], [torch.zeros(3)], torch.inf),
        ([], [torch.zeros(3)], torch.inf),
        ([torch.tensor([torch.inf, 1])], [torch.tensor([torch.inf, 1])], 0),
        ([torch.tensor([torch.nan, 1])], [torch.tensor([torch.nan, 1])], 0),
        ([torch.tensor([torch.nan, 1])], [torch.tensor([0.0, 1])], torch.inf),
        ([torch.tensor([1])], [torch.tensor([2])], 0),  # numbers of boxes, classes: they follow from the rest
        ([torch.tensor([1j])], [torch.tensor([2j])], 0.5),
        ([torch.zeros(0)], [torch.zeros(0)], 0),
    ],
)
def test_largest_error(got, wanted, error):
    assert largest_error(got, wanted) == error


def test_a_model_that_cannot_train_on_the_input_is_judged_in_evaluation():
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2)).eval()
    data = image(batch=1)
    found, records = planned(net, data, ratio=0.5)
    assert apply_channels(net, found, records, data) == records and net[0].out_channels == 4


def test_fast_paths_of_torch_do_not_hide_operators():
    """nn.MultiheadAttention runs as one operator in evaluation, unless a mode for functions is on."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.a, self.b = (
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.Linear(8, 12),
                nn.Linear(12, 8),
            )

        def forward(self, x):
            return self.b(self.a(x + self.attention(x, x, x, need_weights=False)[0]).relu())

    net, data = Block().eval(), torch.randn(2, 5, 8)
    found, records = planned(net, data, ratio=0.5)
    masked, _ = run_masked(net, parse_inputs(net, data), found, found.removed_mask(records, net))
    assert [node.op for node in masked.nodes] == [node.op for node in found.graph.nodes]
    assert apply_channels(net, found, records, data) == records
