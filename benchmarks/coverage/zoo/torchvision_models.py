"""Models of torchvision: classification, segmentation, video, detection, optical flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.coverage.zoo.entry import Entry, images, member

_CLASSIFIERS = {
    **dict.fromkeys(("resnet18", "resnext50_32x4d", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v2"), 64),
    **dict.fromkeys(("mobilenet_v3_small", "mnasnet0_5", "densenet121", "efficientnet_b0", "efficientnet_v2_s"), 64),
    **dict.fromkeys(("regnet_x_400mf", "regnet_y_400mf", "googlenet", "convnext_tiny", "swin_t"), 64),
    "inception_v3": 96,
}
_WITHOUT_AUXILIARY = {"googlenet", "inception_v3"}
_VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")
_SEGMENTATION = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")
_DETECTION = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"min_size": 96, "max_size": 128},
    "retinanet_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "fcos_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "ssdlite320_mobilenet_v3_large": {},
}


def _build(path: str, **arguments: Any) -> Any:
    def build() -> nn.Module:
        model: nn.Module = member("torchvision", f"models.{path}")(**arguments)
        return model

    return build


def _classifier(name: str, size: int) -> Entry:
    init = {"init_weights": False} if name in _WITHOUT_AUXILIARY else {}
    return Entry(f"torchvision/{name}", "torchvision", _build(name, weights=None, **init), images(size))


def _segmentation(name: str) -> Entry:
    build = _build(f"segmentation.{name}", weights=None, weights_backbone=None)
    return Entry(f"torchvision/{name}", "torchvision", build, images(64))


def _video(name: str) -> Entry:
    build = _build(f"video.{name}", weights=None)
    return Entry(f"torchvision/{name}", "torchvision", build, lambda: (torch.rand(2, 3, 8, 32, 32),))


def _detector(name: str, sizes: dict[str, int]) -> Entry:
    build = _build(f"detection.{name}", weights=None, weights_backbone=None, **sizes)
    return Entry(
        f"torchvision/{name}", "torchvision", build, lambda: ([torch.rand(3, 96, 128), torch.rand(3, 96, 96)],)
    )


_VIT = {"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 4, "hidden_dim": 128, "mlp_dim": 256}
ENTRIES = [
    *(_classifier(name, size) for name, size in _CLASSIFIERS.items()),
    Entry("torchvision/vit_small", "torchvision", _build("VisionTransformer", **_VIT), images(64)),
    *(_segmentation(name) for name in _SEGMENTATION),
    *(_video(name) for name in _VIDEO),
    *(_detector(name, sizes) for name, sizes in _DETECTION.items()),
    Entry(
        "torchvision/raft_small",
        "torchvision",
        _build("optical_flow.raft_small", weights=None),
        lambda: (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2),
    ),
]
