"""Networks of segmentation_models_pytorch."""

from __future__ import annotations

from torch import nn

from benchmarks.coverage.zoo.entry import Entry, images, member

_PACKAGE = "segmentation_models_pytorch"
_NETWORKS = {
    "Unet": "resnet18",
    "FPN": "mobilenet_v2",
    "UnetPlusPlus": "resnet18",
    "Linknet": "resnet18",
    "PSPNet": "resnet18",
    "PAN": "resnet18",
    "DeepLabV3Plus": "resnet18",
    "MAnet": "resnet18",
    "UPerNet": "resnet18",
    "Segformer": "mit_b0",
}


def _entry(name: str, encoder: str) -> Entry:
    def build() -> nn.Module:
        model: nn.Module = member(_PACKAGE, name)(encoder_name=encoder, encoder_weights=None, classes=2)
        return model

    return Entry(f"smp/{name}", _PACKAGE, build, images(128 if name == "PAN" else 64))


ENTRIES = [_entry(name, encoder) for name, encoder in _NETWORKS.items()]
