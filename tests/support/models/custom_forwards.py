"""Layers whose class has a forward of its own, in the style of model packages, and nets of one each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class TransposingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class SamePadConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, step in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // step) - 1) * step + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / (var + 1e-6).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledConv(nn.Conv2d):
    def __init__(self, cin: int, cout: int, kernel: int, **arguments: int) -> None:
        super().__init__(cin, cout, kernel, **arguments)
        self.gain = nn.Parameter(torch.rand(cout, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows, gain = self.weight.reshape(1, self.out_channels, -1), self.gain.view(-1) * 0.2
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class HalvedLinear(nn.Linear):
    """`chunk` hands out two parts of the weight at once."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.chunk(2)
        return F.linear(x, torch.cat([0.5 * first, second]), self.bias)


class LowRankLinear(nn.Linear):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(cin, cout)
        self.a, self.b = nn.Parameter(torch.randn(2, cin) * 0.1), nn.Parameter(torch.randn(cout, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.a), self.b)


class MergedLinear(LowRankLinear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.weight + self.b @ self.a, bias=self.bias)


class BlurredTransposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.avg_pool2d(super().forward(x, output_size), 2)


class Columns(nn.Module):
    """A weight [in, out] and addmm, as in GPT-2."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(cin, cout) * 0.2), nn.Parameter(torch.randn(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.reshape(*x.shape[:-1], self.weight.shape[1])


class EqualisedConv(nn.Module):
    """No layer of torch's: a weight that is scaled, no bias."""

    def __init__(self, cin: int, cout: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.1, padding=1)


class ActivatedNorm(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training or not self.track_running_stats
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, batch, self.momentum, self.eps)
        return F.relu(x)


class Net(nn.Module):
    """The layer between two plain ones."""

    def __init__(self, layer: nn.Module, image: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False) if image else nn.Linear(12, 8)
        self.norm = ActivatedNorm(8) if image else nn.ReLU()
        self.layer = layer
        self.after = ActivatedNorm(8) if image else nn.ReLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if image else nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.after(self.layer(self.norm(self.first(x))))))


IMAGES = {
    "same_padding": lambda: SamePadConv(8, 8, 3, 2),
    "depthwise": lambda: SamePadConv(8, 8, 3, groups=8),
    "standardised": lambda: StandardisedConv(8, 8, 3, padding=1),
    "scaled": lambda: ScaledConv(8, 8, 3, groups=2),
    "transposed": lambda: BlurredTransposed(8, 8, 2, 2),
    "no_class": lambda: EqualisedConv(8, 8, 3),
}
VECTORS = {
    "cast": lambda: CastingLinear(8, 8),
    "matmul": lambda: TransposingLinear(8, 8),
    "chunked": lambda: HalvedLinear(8, 8),
    "low_rank": lambda: LowRankLinear(8, 8),
    "merged": lambda: MergedLinear(8, 8),
    "columns": lambda: Columns(8, 8),
}
KINDS = (*IMAGES, *VECTORS)


def net_and_input(kind: str) -> tuple[nn.Module, Tensor]:
    """A net with a layer of this kind, its statistics and weights other than at the start, and an input."""
    torch.manual_seed(0)
    image = kind in IMAGES
    net = Net((IMAGES if image else VECTORS)[kind](), image)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return net, torch.randn(4, 3, 9, 9) if image else torch.randn(4, 5, 12)


def train(model: nn.Module, x: Tensor) -> None:
    """Two steps, in which every parameter has a gradient."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
