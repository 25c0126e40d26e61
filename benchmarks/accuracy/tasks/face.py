"""Face or not: MTCNN's refinement network on scikit-image's faces and patches of photographs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.datasets.images import uniform
from benchmarks.accuracy.datasets.packages import faces, mtcnn_refine_weights, photographs
from benchmarks.accuracy.statistics import area_under_curve
from benchmarks.accuracy.tasks.base import Phase, Task
from benchmarks.accuracy.training import Budget

_SIZE, _TRAINING_FACES, _TEST_COPIES = 24, 60, 16


class RefineNet(nn.Module):
    """MTCNN's RNet without its boxes: (batch, 3, 24, 24) to logits (batch,)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = x.permute(0, 3, 2, 1).flatten(1)
        logits = self.dense5_1(self.prelu4(self.dense4(x)))
        return logits[:, 1] - logits[:, 0]


def _views(images: Tensor, generator: torch.Generator) -> Tensor:
    """(count, 1, h, w) in 0 to 1, turned, moved, scaled, mirrored, dimmed, under noise, as (count, 3, 24, 24)."""
    count = len(images)
    angle, scale = uniform(generator, count) * 0.35, torch.exp(uniform(generator, count) * 0.2)
    mirror = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    shift = uniform(generator, count, 2) * 0.2
    row0 = [angle.cos() / scale * mirror, -angle.sin() / scale, shift[:, 0]]
    row1 = [angle.sin() / scale * mirror, angle.cos() / scale, shift[:, 1]]
    theta = torch.stack(row0 + row1, 1).reshape(count, 2, 3)
    grid = F.affine_grid(theta, [count, 1, _SIZE, _SIZE], align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    contrast = 0.55 + 0.45 * uniform(generator, count, 1, 1, 1)
    light = 0.5 + 0.25 * uniform(generator, count, 1, 1, 1)
    noise = torch.randn(moved.shape, generator=generator) * 0.12 * (1 + uniform(generator, count, 1, 1, 1))
    seen = ((moved - moved.mean((2, 3), keepdim=True)) * contrast + light + noise).clamp(0, 1)
    return ((seen * 255 - 127.5) / 128).expand(-1, 3, -1, -1)


class Face(Task):
    name = "face"
    about = (
        "MTCNN's RNet (3 Conv2d, 2 Linear, PReLU, MaxPool) with the weights of facenet-pytorch, adapted here; 60 "
        "faces and 60 patches of scikit-image and parts of its photographs under changes of pose and light, test on "
        "40 and 40 others, 16 views each"
    )
    score_name = "area under the ROC curve, %"
    budget = Budget(steps=60, lr=2e-4, batch=64)
    float_training = (Phase(300, 5e-4),)
    shared_float_model = True
    keep_8_bits = ("conv1",)
    classifier = "dense5_1"

    def load(self) -> None:
        self.weights = mtcnn_refine_weights()
        images, labels = faces()
        yes, no = images[labels == 1], images[labels == 0]
        self.faces, self.others = yes[:_TRAINING_FACES], no[:_TRAINING_FACES]
        self.photographs = [photo.unsqueeze(0) for photo in photographs()]
        generator = torch.Generator().manual_seed(9)
        test = torch.cat([yes[_TRAINING_FACES:], no[_TRAINING_FACES:]])
        self.test_x = torch.cat([_views(test, generator) for _ in range(_TEST_COPIES)])
        half = len(test) // 2
        self.test_y = torch.cat([torch.ones(half), torch.zeros(half)]).repeat(_TEST_COPIES)

    def network(self) -> nn.Module:
        model = RefineNet()
        model.load_state_dict({name: value for name, value in self.weights.items() if not name.startswith("dense5_2")})
        return model

    def _patch(self, generator: torch.Generator) -> Tensor:
        """A square of 25 to 100 pixels of a photograph, brought to 25 x 25."""
        photo = self.photographs[int(torch.randint(len(self.photographs), (), generator=generator))]
        side = int(torch.randint(25, 101, (), generator=generator))
        top = int(torch.randint(photo.shape[1] - side + 1, (), generator=generator))
        left = int(torch.randint(photo.shape[2] - side + 1, (), generator=generator))
        square = photo[:, top : top + side, left : left + side].unsqueeze(0)
        return F.interpolate(square, (25, 25), mode="area")[0]

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Half faces; of the others half are patches of photographs."""
        chosen, generator = self.sample_indices(_TRAINING_FACES, step, seed)
        half, quarter = self.budget.batch // 2, self.budget.batch // 4
        patches = torch.stack([self._patch(generator) for _ in range(quarter)])
        images = torch.cat([self.faces[chosen[:half]], self.others[chosen[half : half + quarter]], patches])
        return _views(images, generator), torch.cat([torch.ones(half), torch.zeros(half)])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target)

    def distillation(self, output: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(output, torch.sigmoid(teacher))

    def score(self, output: Tensor) -> float:
        return 100 * area_under_curve(output, self.test_y[: len(output)] > 0.5)
