"""oneDNN's operators: when they count as there, and which bounds they have."""

from __future__ import annotations

import pytest
import torch

from amct_ext.layers.products import prepared_ops


def test_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert not prepared_ops.is_available()
    monkeypatch.undo()
    assert prepared_ops.is_available() and prepared_ops._has_operators.__wrapped__()
    for name, count in (("_linear_pointwise", 5), ("_of_another_torch", 5)):
        monkeypatch.setitem(prepared_ops._NUM_ARGUMENTS, name, count)
        assert not prepared_ops._has_operators.__wrapped__()
        monkeypatch.undo()


def test_bounds_that_onednn_has() -> None:
    assert prepared_ops.bounds(0.0, None) == prepared_ops.RELU and prepared_ops.bounds(-1.0, None) is None
    assert prepared_ops.bounds(0.0, 6.0) == ("hardtanh", (0.0, 6.0)) and prepared_ops.bounds(2.0, 1.0) is None
