"""Wrappers around a model are taken off, and DistributedDataParallel is put back with its settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from amct_ext.common.wrapping import unwrap, wrap_like


@pytest.fixture
def _group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_plain_model_is_itself() -> None:
    model = nn.Linear(2, 2)
    assert unwrap(model) is model and wrap_like(model, other := nn.Linear(2, 2)) is other


@pytest.mark.usefixtures("_group")
def test_wrappers_around_each_other_are_taken_off() -> None:
    model = nn.Linear(2, 2)
    assert unwrap(torch.compile(DistributedDataParallel(torch.compile(model)))) is model


@pytest.mark.usefixtures("_group")
def test_the_new_wrapper_has_the_settings_and_mode_of_the_old_one() -> None:
    settings = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "find_unused_parameters": True}
    original = DistributedDataParallel(nn.Linear(2, 2), **settings).eval()
    inner = nn.Linear(2, 3)
    wrapped = wrap_like(torch.compile(original), inner)  # type: ignore[arg-type]
    assert isinstance(wrapped, DistributedDataParallel) and wrapped.module is inner
    assert {name: getattr(wrapped, name) for name in settings} == settings
    assert not wrapped.training and not inner.training
