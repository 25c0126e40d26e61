"""Distorted images, so that a small set of images gives many."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform values of -1 to 1."""
    return torch.rand(*shape, generator=generator) * 2 - 1


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images turned, scaled, sheared, moved, dimmed and under noise; (count, channels, height, width), as MNIST's."""
    count = len(images)
    angle = uniform(generator, count) * 0.6
    scale = torch.exp(uniform(generator, count, 2) * 0.3)
    shear = uniform(generator, count) * 0.5
    shift = uniform(generator, count, 2) * 0.3
    row0 = [angle.cos() / scale[:, 0], -angle.sin() + shear, shift[:, 0]]
    row1 = [angle.sin(), angle.cos() / scale[:, 1], shift[:, 1]]
    theta = torch.stack(row0 + row1, 1).reshape(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    dimmed = moved * (0.7 + 0.3 * uniform(generator, count, 1, 1, 1))
    noise = torch.randn(images.shape, generator=generator) * 0.125
    return (dimmed + noise * (1 + uniform(generator, count, 1, 1, 1)) - 0.13) / 0.31
