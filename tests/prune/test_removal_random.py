"""Pruned output = masked output for random networks, and for third-party architectures as they come."""

from __future__ import annotations

import pytest
import real_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checks.pruning_proof import prove
from support.models.pruning_nets import SqueezeExcite, conv, image
from torch import nn


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
        else:
            other = (pick // 5) % len(widths)
            width += widths[other]
            if width > 40:
                return
            self.steps.append(("cat", source, other))
        widths.append(width)

    def forward(self, x):
        tensors = [x]
        for kind, one, two in self.steps:
            if kind == "layer":
                tensors.append(self.layers[one](tensors[two]))
            elif kind == "cat":
                tensors.append(torch.cat([tensors[one], tensors[two]], 1))
            else:
                tensors.append(tensors[one] + tensors[two] if kind == "add" else tensors[one] * tensors[two].tanh())
        return self.head(tensors[-1].flatten(1) if self.flat else tensors[-1].mean((2, 3)))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    numbers=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 999)), min_size=4, max_size=14),
    batch=st.integers(1, 2),
    flat=st.booleans(),
    ratio=st.sampled_from([0.2, 0.5, 0.8]),
    seed=st.integers(0, 99),
)
def test_random_network(numbers, batch, flat, ratio, seed):
    torch.manual_seed(seed)
    prove(Random([(0, numbers[0][1]), *numbers], flat), image(3, batch, 4), ratio, tolerance=1e-4)


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
    cut, stays = prove(model, real_models.sample(name, batch=2), tolerance=1e-4, mixes=name in MIXING)
    assert len(cut) >= at_least, stays
    assert all(stays.values())
