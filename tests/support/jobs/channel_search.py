"""A search for pruning ratios in a folder of its own, and the messages that its plug-ins read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.models import small
from support.models.wide_model import operations
from torch import Tensor, nn

import amct_ext
from amct_ext.common.files import write_if_changed
from amct_ext.config.text import parse_config

GENERATOR = torch.Generator().manual_seed(0)
DATA, LABEL = torch.randn(6, 3, 12, 12, generator=GENERATOR), torch.randn(6, 5, generator=GENERATOR)
CLASSES = torch.randint(5, (6,), generator=GENERATOR)


class Search:
    """A search in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.out = folder, folder / "search.cfg", folder / "out" / "prune.cfg"

    def run(self, text: str, model: nn.Module | None = None, data: Any = None, **plugins: Any) -> dict[str, float]:
        """Search; returns layer -> ratio as written, 0 for skipped layers."""
        write_if_changed(self.config, text)
        amct_ext.auto_channel_prune_search(
            model or small.build(), str(self.config), data or [DATA, LABEL], str(self.out), **plugins
        )
        config = parse_config(self.out)
        ratios = {item.target: item.prune.ratio for item in config.override_layer_configs}  # type: ignore[union-attr]
        return ratios | dict.fromkeys(config.regular_prune_skip_layers, 0.0)

    def cost_ratio(self, build: Any = small.build, sample: Tensor = small.SAMPLE) -> float:
        """How many times cheaper create makes the model with the written file, counted on the pruned model itself."""
        pruned = amct_ext.create_prune_retrain_model(build(), sample, str(self.out), str(self.folder / "record.txt"))
        return operations(build(), sample) / operations(pruned, sample)


def scores(records: Any) -> dict[str, list[float]]:
    nodes = [record.producer[0] for record in records]
    return {node.name: list(next(a.floats for a in node.attr if a.name == "sensitivity")) for node in nodes}


def write_floats(record: Any, values: list[float]) -> None:
    """As the guide's readers write it: a message of AMCT's with a name, a type and floats."""
    attr = record.producer[0].attr.add(name="sensitivity", type=4)
    attr.floats.extend(values)


class Returns(amct_ext.SearchChannelBase):
    def __init__(self, chosen: Any) -> None:
        self.chosen = chosen

    def channel_prune_search(self, graph_info: Any, search_records: Any, prune_config: Any) -> Any:
        return self.chosen
