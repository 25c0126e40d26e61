"""Print, as Markdown, what happens to the layers of third-party architectures: the table in docs/migration.md.

    pip install '.[dev]' && python tools/model_table.py

Each architecture of tools/real_models.py is explained twice: with channel pruning and with 2:4 sparsity, each together
with quantisation.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnxruntime
import real_models
import torch
import transformers

import amct_ext

QUANT = "retrain_data_quant_config { ulq_quantize { } } retrain_weight_quant_config { arq_retrain { } }\n"
FILTER = "prune_config { filter_pruner { balanced_l2_norm_filter_prune { prune_ratio: 0.3 ascend_optimized: false } } }"
SPARSE = "prune_config { n_out_of_m_pruner { l1_selective_prune { n_out_of_m_type: M4N2 } } }"

# Reasons name the operator that they speak of; grouped, only its kind is told.
_PHRASES = (
    (r"combines the channels with parameter", "combined with a parameter that stays (layer scale, class token)"),
    (r"combines the channels with", "added to a tensor whose channels stay (residual stream)"),
    (r"depthwise", "depthwise: its channels follow from its input's"),
    (r"output of the model", "an output of the model"),
    (r"shares a parameter|weight is shared", "its weight is also an Embedding's"),
)


def grouped(reasons: Iterable[str]) -> str:
    """'reason (n); ...', the most frequent first."""
    counts: Counter[str] = Counter()
    for reason in reasons:
        counts[next((text for pattern, text in _PHRASES if re.search(pattern, reason)), reason)] += 1
    return "; ".join(f"{text} ({count})" for text, count in counts.most_common()) or "-"


def row(name: str, folder: Path) -> str:
    """One architecture's line of the table."""
    reports = []
    for text in (FILTER + QUANT, SPARSE + QUANT):
        config = folder / "compress.cfg"
        config.write_text(text)
        found = amct_ext.explain(real_models.build(name), real_models.sample(name), config).values()
        reports.append([layer for layer in found if layer.is_layer])
    filtered, sparse = reports
    whole = [layer for layer in filtered if layer.not_pruned]
    alone = [layer for layer in sparse if layer.left_alone]
    cells = (
        name,
        len(filtered),
        sum(bool(layer.quantised) for layer in filtered),
        len(filtered) - len(whole),
        grouped(layer.not_pruned for layer in whole),
        sum(bool(layer.pruned) for layer in sparse),
        grouped(layer.not_quantised for layer in alone),
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    """Print the versions and the table."""
    versions = {"transformers": transformers, "torch": torch, "onnxruntime": onnxruntime}
    said = ", ".join(f"{name} {module.__version__.partition('+')[0]}" for name, module in versions.items())
    print(f"With {said}:\n")
    print("| model | layers | quantised | outputs pruned | outputs kept, why | 2:4 | float and dense under 2:4, why |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in real_models.NAMES:
            print(row(name, Path(folder)))


if __name__ == "__main__":
    main()
