"""Networks of monai, in two and in three dimensions."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.coverage.zoo.entry import Entry, images, member

_CHANNELS: dict[str, Any] = {"in_channels": 1, "out_channels": 2}
_UNET: dict[str, Any] = _CHANNELS | {"channels": (16, 32, 64), "strides": (2, 2), "num_res_units": 2}
_DYNAMIC: dict[str, Any] = _CHANNELS | {
    "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [16, 32, 64],
}  # fmt: skip


def _entry(name: str, cls: str, size: int, dims: int = 2, **arguments: Any) -> Entry:
    def build() -> nn.Module:
        model: nn.Module = member("monai", f"networks.nets.{cls}")(**arguments)
        return model

    return Entry(f"monai/{name}", "monai", build, images(size, 1, 2, dims))


ENTRIES = [
    _entry("UNet", "UNet", 32, spatial_dims=2, **_UNET),
    _entry("UNet_3d", "UNet", 16, 3, spatial_dims=3, **_UNET),
    _entry("UNet_batch", "UNet", 32, spatial_dims=2, norm="batch", **_UNET),
    _entry("AttentionUnet", "AttentionUnet", 32, spatial_dims=2, **_CHANNELS, channels=(16, 32, 64), strides=(2, 2)),
    _entry("BasicUNet", "BasicUNet", 32, spatial_dims=2, features=(16, 16, 32, 64, 64, 16), **_CHANNELS),
    _entry("SegResNet", "SegResNet", 32, spatial_dims=2, init_filters=16, **_CHANNELS),
    _entry("SegResNet_3d", "SegResNet", 16, 3, spatial_dims=3, init_filters=16, **_CHANNELS),
    _entry("DynUNet", "DynUNet", 32, spatial_dims=2, **_DYNAMIC),
    _entry("DynUNet_3d", "DynUNet", 16, 3, spatial_dims=3, **_DYNAMIC),
    _entry("VNet", "VNet", 16, 3, spatial_dims=3, in_channels=1, out_channels=2),
    _entry("HighResNet", "HighResNet", 16, 3, spatial_dims=3, **_CHANNELS),
    _entry("DenseNet121", "DenseNet121", 64, spatial_dims=2, **_CHANNELS),
    _entry("SEResNet50", "SEResNet50", 64, spatial_dims=2, in_channels=1, num_classes=2),
    _entry("EfficientNetBN", "EfficientNetBN", 64, model_name="efficientnet-b0", spatial_dims=2, in_channels=1,
           num_classes=2, pretrained=False),
    _entry("UNETR", "UNETR", 32, 3, img_size=32, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4, **_CHANNELS),
    _entry("SwinUNETR", "SwinUNETR", 64, spatial_dims=2, feature_size=12, **_CHANNELS),
    _entry("AutoEncoder", "AutoEncoder", 32, spatial_dims=2, channels=(16, 32, 64), strides=(2, 2, 2), **_CHANNELS),
]  # fmt: skip
