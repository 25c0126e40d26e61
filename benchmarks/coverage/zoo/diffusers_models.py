"""Networks of diffusers at small size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.zoo.entry import Entry, images, member

_BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1}
_UNET = _BLOCKS | {
    "sample_size": 16, "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
_CONDITIONAL = _BLOCKS | {
    "sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
_CODER = _BLOCKS | {
    "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
_TRANSFORMER = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 8,
    "norm_num_groups": 4,
}  # fmt: skip


def _entry(name: str, cls: str, inputs: Callable[[], tuple[Any, ...]], **arguments: Any) -> Entry:
    def build() -> nn.Module:
        model: nn.Module = member("diffusers", cls)(**arguments)
        return model

    return Entry(f"diffusers/{name}", "diffusers", build, inputs)


def _noisy(channels: int, size: int, *more: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, channels, size, size), torch.tensor(5), *(torch.randn(*shape) for shape in more))


ENTRIES = [
    _entry("UNet2DModel", "UNet2DModel", _noisy(3, 16), **_UNET),
    _entry("UNet2DConditionModel", "UNet2DConditionModel", _noisy(4, 16, (2, 8, 32)), **_CONDITIONAL),
    _entry("AutoencoderKL", "AutoencoderKL", images(32), **_CODER),
    _entry("VQModel", "VQModel", images(32), num_vq_embeddings=32, **_CODER),
    _entry("Transformer2DModel", "Transformer2DModel", lambda: (torch.randn(2, 4, 8, 8),), **_TRANSFORMER),
]
