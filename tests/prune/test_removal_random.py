"""Pruned output = masked output for random networks, and for third-party architectures as they come."""

from __future__ import annotations

import pytest
import real_models
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.checks.pruning_check import check_pruning
from support.models.conv_blocks import SqueezeExcite, conv, image
from torch import nn


class Normalised(nn.LayerNorm):
    """LayerNorm over the channels of an image."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gated(y):
    one, two = y.chunk(2, 1)
    return one * two.sigmoid()


def shuffled(y):
    b, c, h, w = y.shape
    return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def partly_changed(y):
    half = y.shape[1] // 2
    return torch.cat([y[:, :half].relu(), y[:, half:]], 1)


def swapped(y):
    return torch.cat(y.chunk(2, 1)[::-1], 1)


def normalised(y):
    return F.normalize(y, dim=1) + y.mean((2, 3), keepdim=True)


MOVES = (gated, shuffled, partly_changed, swapped, normalised)


class Random(nn.Module):
    """A network from a list of numbers: each pair picks an operation and the tensors it works on."""

    def __init__(self, numbers, flat):
        super().__init__()
        self.layers, self.steps, self.flat = nn.ModuleList(), [], flat
        widths = [3]
        for kind, pick in numbers:
            self._add(kind, pick, widths)
        self.head = nn.Linear(widths[-1] * (16 if flat else 1), 3)

    def _add(self, kind, pick, widths):
        source = max(0, len(widths) - 1 - pick % 3)  # mostly deep
        width = widths[source]
        same = [i for i, other in enumerate(widths) if other == width]
        partner = same[(pick // 7) % len(same)]
        new = [4, 6, 8, 12][pick % 4]
        layer = {
            10: lambda: (nn.GroupNorm(2 if width % 2 == 0 else 1, width), width),
            11: lambda: (Normalised(width), width),
            12: lambda: (nn.PReLU(width), width),
            0: lambda: (conv(width, new), new),
            1: lambda: (nn.BatchNorm2d(width), width),
            2: lambda: (conv(width, width * (1 + pick % 2), groups=width), width * (1 + pick % 2)),
            3: lambda: (SqueezeExcite(width), width),
            4: lambda: ([nn.SiLU(), nn.ReLU(), nn.Sigmoid(), nn.PReLU()][pick % 4], width),
            5: lambda: (conv(width, 12, groups=2 if width % 2 == 0 else 1), 12),
            6: lambda: (nn.ConvTranspose2d(width, new, 3, padding=1), new),
        }.get(kind)
        if layer is not None:
            module, width = layer()
            self.layers.append(module)
            self.steps.append(("layer", len(self.layers) - 1, source))
        elif kind in (7, 8):
            self.steps.append(("add" if kind == 7 else "mul", source, partner))
        elif kind == 9:
            other = (pick // 5) % len(widths)
            width += widths[other]
            if width > 40:
                return
            self.steps.append(("cat", source, other))
        else:
            if width % 4:
                return
            self.steps.append((MOVES[pick % len(MOVES)], source, 0))
            width //= 2 if self.steps[-1][0] is gated else 1
        widths.append(width)

    def forward(self, x):
        tensors = [x]
        for kind, one, two in self.steps:
            if kind == "layer":
                tensors.append(self.layers[one](tensors[two]))
            elif kind == "cat":
                tensors.append(torch.cat([tensors[one], tensors[two]], 1))
            elif callable(kind):
                tensors.append(kind(tensors[one]))
            else:
                tensors.append(tensors[one] + tensors[two] if kind == "add" else tensors[one] * tensors[two].tanh())
        return self.head(tensors[-1].flatten(1) if self.flat else tensors[-1].mean((2, 3)))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    numbers=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 999)), min_size=4, max_size=14),
    batch=st.integers(1, 2),
    flat=st.booleans(),
    ratio=st.sampled_from([0.2, 0.5, 0.8]),
    seed=st.integers(0, 99),
)
@example(  # channels-last results of norms, behind which torch runs other operators
    numbers=[(2, 598), (0, 340), (14, 357), (4, 92), (11, 679), (13, 753), (10, 892), (10, 823), (10, 173), (4, 905),
             (0, 678), (3, 101), (14, 761), (10, 871), (3, 350), (10, 927)],
    batch=2, flat=True, ratio=0.8, seed=65,
)  # fmt: skip
def test_random_network(numbers, batch, flat, ratio, seed):
    torch.manual_seed(seed)
    # Means over channels and norms mix them: zero weights are not all there is to mask.
    mixes = any(kind in (10, 11) or kind > 12 for kind, _ in numbers)
    check_pruning(Random([(0, numbers[0][1]), *numbers], flat), image(3, batch, 4), ratio, tolerance=1e-4, mixes=mixes)


def unscaled(model):
    """ConvNeXt starts its blocks at a millionth of their size: what they compute would vanish in rounding."""
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


MIXING = ("ConvNeXt", "ViT", "Swin", "BERT", "Llama")  # LayerNorm


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("ResNet", 17), ("MobileNetV2", 30), ("ConvNeXt", 5), ("EfficientNet", 25), ("RegNet", 15), ("ViT", 1),
     ("Swin", 4), ("BERT", 1), ("Llama", 2)],
)  # fmt: skip
def test_third_party(name, at_least):
    pytest.importorskip("transformers", reason="the architectures come from the transformers package")
    model = unscaled(real_models.build(name))
    cut, stays = check_pruning(model, real_models.sample(name, batch=2), tolerance=1e-4, mixes=name in MIXING)
    assert len(cut) >= at_least, stays
    assert all(stays.values())
