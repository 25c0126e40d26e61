"""Small networks in the style of real ones whose forwards are awkward to capture."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()


class Body(nn.Module):
    """A backbone with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn_relu(3, 16), *conv_bn_relu(16, 16))
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 1, 1)


def suppressed(boxes: Tensor, scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Non-maximum suppression in torch's own operators, with sizes that depend on values."""
    order, kept = scores.argsort(descending=True), []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while order.numel():
        first, rest = order[0], order[1:]
        kept.append(first)
        low, high = torch.max(boxes[rest, :2], boxes[first, :2]), torch.min(boxes[rest, 2:], boxes[first, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = rest[shared / (area[rest] + area[first] - shared + 1e-6) <= threshold]
    return torch.stack(kept)


class Suppression(Body):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.body(x)
        corner, size = self.boxes(f)[0].flatten(1).T.abs().split(2, 1)
        boxes, scores = torch.cat([corner, corner + size], 1), self.scores(f)[0].flatten().sigmoid()
        kept = suppressed(boxes, scores)
        return boxes[kept], scores[kept]


class PaddedImages(Body):
    """A list of images of different sizes, padded into one batch."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        batch = images[0].new_zeros(len(images), 3, height, width)
        for image, place in zip(images, batch, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        f = self.body(batch)
        return [
            {"boxes": boxes.flatten(1).T, "scores": scores.flatten().sigmoid()}
            for boxes, scores in zip(self.boxes(f), self.scores(f), strict=True)
        ]


class Doubling(Body):
    def forward(self, x: Tensor) -> Tensor:
        f = self.body(x)
        while f.abs().mean() < 4:
            f = f * 2 + 0.1
        return self.scores(f)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    count: int = 3


class ReturnsDataclass(Body):
    def forward(self, x: Tensor) -> Output:
        f = self.body(x)
        return Output(self.scores(f), [f, self.boxes(f)])


class ReturnsLists(Body):
    def forward(self, x: Tensor) -> dict[str, Any]:
        f = self.body(x)
        return {"boxes": list(self.boxes(f)), "scores": [s.flatten() for s in self.scores(f)], "height": x.shape[2]}


WithAux = namedtuple("WithAux", ["logits", "aux"])


class Auxiliary(Body):
    """A head that runs in training alone, and a named tuple with None in its place (GoogLeNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> WithAux:
        f = self.body(x)
        return WithAux(self.scores(f), self.aux(f) if self.training else None)


class Keywords(Body):
    def forward(self, x: Tensor, **more: Any) -> dict[str, Tensor]:
        scores = self.scores(self.body(x) * more["gain"])
        return {"scores": scores, **{name: value * 2 for name, value in more.items() if isinstance(value, Tensor)}}


class Nested:
    """DETR's padded batch with its mask."""

    def __init__(self, images: list[Tensor]) -> None:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        self.tensors = torch.zeros(len(images), 3, height, width)
        self.mask = torch.ones(len(images), height, width, dtype=torch.bool)
        for index, image in enumerate(images):
            self.tensors[index, :, : image.shape[1], : image.shape[2]] = image
            self.mask[index, : image.shape[1], : image.shape[2]] = False


class Queries(Body):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.attention = nn.Embedding(5, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.classes, self.places = nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, images: list[Tensor]) -> dict[str, Tensor]:
        samples = Nested(images)
        f = self.body(samples.tensors)
        mask = F.interpolate(samples.mask[None].float(), size=f.shape[-2:]).bool()[0].flatten(1)
        f, query = f.flatten(2).mT, self.query.weight[None].expand(len(images), -1, -1)
        h = self.attention(query, f, f, key_padding_mask=mask)[0]
        return {"logits": self.classes(h), "boxes": self.places(h).sigmoid()}


class CachedAnchors(Body):
    """The head of a YOLO: anchors are made anew where the shape changes, evaluation decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: torch.Size | None = None
        self.anchors = torch.empty(0)

    def forward(self, x: Tensor) -> Any:
        f = self.body(x)
        y = torch.cat((self.boxes(f), self.scores(f)), 1)
        if self.training:
            return y
        if self.shape != y.shape:
            rows, columns = torch.arange(y.shape[2]) + 0.5, torch.arange(y.shape[3]) + 0.5
            self.anchors = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).flatten(1)
            self.shape = y.shape
        boxes, scores = y.flatten(2).split((4, 1), 1)
        low, high = boxes.chunk(2, 1)
        return torch.cat((self.anchors - low, self.anchors + high, scores.sigmoid()), 1), [y]


class Routed(Body):
    """A mixture of experts that picks the rows of each."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.out = nn.Linear(16, 2), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(x).flatten(2).mT.reshape(-1, 16)
        chosen, total = self.route(tokens).argmax(-1), torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if rows.numel():
                total.index_add_(0, rows, expert(tokens[rows]))
        return self.out(total)


class Thresholded(Body):
    """A detector with losses in training: images and targets are lists."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        f = self.body(torch.stack(images))
        boxes, scores = self.boxes(f).flatten(2).mT, self.scores(f).flatten(1).sigmoid()
        if self.training:
            assert targets is not None
            wanted = torch.stack([target["boxes"].mean(0) for target in targets])
            return {"boxes": (boxes.mean(1) - wanted).abs().sum(), "scores": scores.mean()}
        kept = [score > 0.4 for score in scores]
        return [{"boxes": b[k], "scores": s[k]} for b, s, k in zip(boxes, scores, kept, strict=True)]


class NoTensor(Body):
    def forward(self, x: Tensor) -> Any:
        scores = self.scores(self.body(x))
        return scores if self.training else scores.detach().numpy()


class NothingFound(Body):
    def forward(self, x: Tensor) -> list[Tensor]:
        scores = self.scores(self.body(x))
        return [scores] if self.training or scores.max() > 1e3 else []


class SparseProduct(Body):
    def forward(self, x: Tensor) -> Tensor:
        f = self.body(x)
        graph = torch.eye(f[0, 0].numel()).to_sparse()
        return self.scores(torch.sparse.mm(graph, f[0].flatten(1).T).T.reshape(f[:1].shape))


def _images() -> tuple[list[Tensor]]:
    return ([torch.rand(3, 24, 32), torch.rand(3, 40, 24)],)


def _batch() -> tuple[Tensor]:
    return (torch.rand(2, 3, 24, 24),)


# By name: the network, its arguments, what a save of it is: captured, traced, or refused.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], str]] = {
    "suppression": (Suppression, lambda: (torch.rand(1, 3, 24, 24),), "traced"),
    "padded images": (PaddedImages, _images, "captured"),
    "while": (Doubling, _batch, "traced"),
    "dataclass": (ReturnsDataclass, _batch, "captured"),
    "dict of lists": (ReturnsLists, _batch, "captured"),
    "auxiliary head": (Auxiliary, _batch, "captured"),
    "keywords": (Keywords, lambda: (*_batch(), {"gain": torch.tensor(2.0), "mode": "x"}), "captured"),
    "queries": (Queries, _images, "captured"),
    "cached anchors": (CachedAnchors, _batch, "captured"),
    "experts": (Routed, _batch, "traced"),
    "targets": (
        Thresholded,
        lambda: ([torch.rand(3, 24, 24)] * 2, [{"boxes": torch.rand(3, 4)}, {"boxes": torch.rand(1, 4)}]),
        "traced",
    ),
    "array": (NoTensor, _batch, "refused"),
    "nothing found": (NothingFound, _batch, "refused"),
    "sparse": (SparseProduct, _batch, "refused"),
}
