"""2:4 masks of layers: renewed in training alone, gradients of what they drop."""

from __future__ import annotations

from pathlib import Path

import torch
from support.jobs.retrain_job import Job, evaluate, optimizer_of, train
from support.models import small

from amct_ext import ops


def test_evaluation_does_not_touch_masks_or_their_counter(tmp_path: Path) -> None:
    model = Job(tmp_path, small.CONFIGS["sparse_refreshed"]).create()
    train(model, optimizer_of(model), range(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.conv1.weight.copy_(torch.randn_like(model.conv1.weight))
    evaluate(model)
    for key, value in model.state_dict().items():
        if "sparsity" in key:
            assert torch.equal(value, before[key]), key
    assert int(model.conv1.sparsity.step) == 3
    train(model, optimizer_of(model), range(3, 4))  # step 3 of a refresh every 2: not due
    assert torch.equal(model.conv1.sparsity.mask, before["conv1.sparsity.mask"])
    weight = model.conv1.weight.detach().clone()
    train(model, optimizer_of(model), range(4, 5))  # step 4: due
    assert torch.equal(model.conv1.sparsity.mask, ops.mask_2to4(weight, 1))


def test_masked_elements_get_no_gradient(tmp_path: Path) -> None:
    model = Job(tmp_path, small.CONFIGS["sparse_quant"]).create()
    model.train()(small.batch(0)[0]).sum().backward()
    mask = model.conv1.sparsity.mask
    assert (model.conv1.weight.grad[~mask] == 0).all() and (model.conv1.weight.grad[mask] != 0).any()
