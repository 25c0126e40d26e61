"""scikit-learn's handwritten digits: 1797 real 8x8 images, split once and for all into training and test set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Images are (N, 1, 8, 8) float32 with about zero mean, labels (N,) int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def steps_per_epoch(self, batch: int) -> int:
        """Whole batches only, so that every step does the same work."""
        return len(self.train_x) // batch


def load_data(test_share: float = 0.3) -> Digits:
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1).div(8).sub(1)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=test_share, stratify=raw.target, random_state=0)
    return Digits(images[train], labels[train], images[test], labels[test])


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch is a function of seed and epoch alone, so a restored run needs only its step number."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def shift_randomly(images: Tensor) -> Tensor:
    """Moves each image by at most one pixel; draws from the global random state, which a checkpoint keeps."""
    count = len(images)
    windows = F.pad(images, (1, 1, 1, 1), value=-1.0).unfold(2, 8, 1).unfold(3, 8, 1)
    down, right = torch.randint(0, 3, (2, count))
    return windows[torch.arange(count), :, down, right]
