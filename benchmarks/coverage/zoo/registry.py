"""All models by name."""

from __future__ import annotations

from benchmarks.coverage.zoo import (
    diffusers_models,
    medical_models,
    segmentation_models,
    timm_models,
    torchvision_models,
    transformers_models,
    ultralytics_models,
)
from benchmarks.coverage.zoo.entry import Entry

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for source in (
        timm_models,
        torchvision_models,
        ultralytics_models,
        transformers_models,
        medical_models,
        segmentation_models,
        diffusers_models,
    )
    for entry in source.ENTRIES
}
