"""Small models and configurations that the flow tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

QUANT = """
retrain_data_quant_config { ulq_quantize { } }
retrain_weight_quant_config { arq_retrain { } }
"""
LEARNED = """
retrain_data_quant_config { ulq_quantize { } }
retrain_weight_quant_config { ulq_retrain { } }
"""
FILTER = (
    "prune_config { filter_pruner { balanced_l2_norm_filter_prune { prune_ratio: 0.3 ascend_optimized: false } } }\n"
)
SPARSE = "prune_config { n_out_of_m_pruner { l1_selective_prune { n_out_of_m_type: M4N2 update_freq: %d } } }\n"
SPARSE_QUANT = SPARSE % 0 + QUANT
MIXED = """
override_layer_types { layer_type: "Linear" prune_config { n_out_of_m_pruner { l1_selective_prune { update_freq: 2 } }
} }
"""
CONFIGS = {
    "quant": QUANT,
    "learned": LEARNED,
    "two_batches": "batch_num: 2\n" + QUANT,
    "filter": FILTER,
    "filter_quant": FILTER + QUANT,
    "sparse": SPARSE % 0,
    "sparse_refreshed": SPARSE % 2,
    "sparse_quant": SPARSE % 2 + QUANT,
    "sparse_learned": SPARSE % 0 + LEARNED,
    "mixed_quant": FILTER + MIXED + QUANT,
}


class Residual(nn.Module):
    """Stem, a residual block with projection, pooling, classifier: convolutions, BatchNorm, addition, shared input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(8, 16, 1, stride=2)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + self.down(x))
        return self.fc(self.drop(x.mean((2, 3))))


def linear(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def build(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Residual()


def batch(i: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    return torch.randn(size, 3, 12, 12, generator=generator), torch.randint(5, (size,), generator=generator)


SAMPLE = batch(-1)[0]
