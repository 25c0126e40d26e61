"""The devices that tests run on."""

from __future__ import annotations

import os

import torch
from support.processes import standin


def devices() -> list[str]:
    """The CPU, CUDA where there is a GPU, and the device that `AMCT_TEST_DEVICE` names (`npu`, `standin`, ...)."""
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    extra = os.environ.get("AMCT_TEST_DEVICE", "")
    if extra == standin.NAME:
        standin.load()
    return found + [extra] * (extra not in ("", *found))


DEVICES = devices()
