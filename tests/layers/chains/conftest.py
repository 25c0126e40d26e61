"""Chains begin at outputs of any size here; by default only at large ones."""

from __future__ import annotations

import pytest

from amct_ext.layers.chains import chain_tensor


@pytest.fixture(autouse=True)
def _chains_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_tensor, "_MIN_VALUES", 0)
