"""Third-party architectures from the transformers package as they come, small, with random weights.

Used by tests/frameworks/test_real_models.py, tests/prune/test_removal.py and tools/model_table.py. Nothing is
downloaded and nothing is adapted to amct_ext: model class, configuration and example input are all there is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, VOCABULARY = 10, 64

_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_labels": CLASSES}
_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, **_BLOCKS}

Build = Callable[[ModuleType], nn.Module]
_BUILDERS: dict[str, Build] = {
    "ResNet": lambda t: t.ResNetForImageClassification(
        t.ResNetConfig(embedding_size=16, layer_type="bottleneck", **_STAGES)
    ),
    "MobileNetV2": lambda t: t.MobileNetV2ForImageClassification(
        t.MobileNetV2Config(depth_multiplier=0.25, num_labels=CLASSES)
    ),
    "ConvNeXt": lambda t: t.ConvNextForImageClassification(t.ConvNextConfig(**_STAGES)),
    "EfficientNet": lambda t: t.EfficientNetForImageClassification(
        t.EfficientNetConfig(
            width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, initializer_range=0.5, num_labels=CLASSES
        )
    ),
    "RegNet": lambda t: t.RegNetForImageClassification(t.RegNetConfig(embedding_size=16, groups_width=16, **_STAGES)),
    "ViT": lambda t: t.ViTForImageClassification(
        t.ViTConfig(image_size=32, patch_size=8, num_labels=CLASSES, **_BLOCKS)
    ),
    "Swin": lambda t: t.SwinForImageClassification(
        t.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=CLASSES,
        )
    ),
    "BERT": lambda t: t.BertForSequenceClassification(t.BertConfig(num_labels=CLASSES, **_TEXT)),
    "Llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, **_TEXT)),
    "Llama, tied": lambda t: t.LlamaForCausalLM(
        t.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **_TEXT)
    ),
}
NAMES = tuple(_BUILDERS)
TEXT = ("BERT", "Llama", "Llama, tied")
CONVOLUTIONAL = ("ResNet", "MobileNetV2", "ConvNeXt", "EfficientNet", "RegNet", "ViT", "Swin")


def build(name: str, seed: int = 0) -> nn.Module:
    """A fresh model, in the train mode that its class gives it. Errors: ImportError where transformers is missing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[name](transformers)


def sample(name: str, seed: int = 0, batch: int = 4) -> Tensor:
    """Images of 32x32 in three channels, or token numbers."""
    generator = torch.Generator().manual_seed(seed)
    if name in TEXT:
        return torch.randint(VOCABULARY, (batch, 12), generator=generator)
    return torch.randn(batch, 3, 32, 32, generator=generator)


def first_tensor(output: Any) -> Tensor:
    """The logits in whatever a model returns."""
    return output.logits if hasattr(output, "logits") else output[0] if isinstance(output, Sequence) else output
