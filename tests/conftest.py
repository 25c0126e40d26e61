"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it and in whichever order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with data of real runs of the reference: `AMCT_GOLDEN`, or `shared/golden` beside the repository."""
    folder = Path(os.environ.get("AMCT_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
    if not (folder / "load.py").is_file():
        pytest.skip(f"no golden data at {folder}: set AMCT_GOLDEN to the folder that holds load.py")
    return folder


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device a kernel exists for; a card is optional."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
