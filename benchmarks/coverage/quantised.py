"""The whole job: pruned and quantised, one training step, evaluated, restored, saved; each result checked."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import amct_ext as amct
from amct_ext.graph.run import tensors_in
from benchmarks.coverage.amct_ext_pruner import configuration, describe, nothing_to_prune
from benchmarks.coverage.layers import Layers, call
from benchmarks.coverage.results import Quantised

_T = TypeVar("_T")
_RATE = 1e-3
_ROUNDING, _DRAWS = 3e-6, 4  # relative error of a layer's sums; evaluations with it
_NOT_WEIGHTS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.EmbeddingBag)


def job(model: nn.Module, inputs: tuple[Any, ...], layers: Layers, ratio: float, profile: str = "AMCT") -> Quantised:
    """Exceptions end the job and are its error."""
    run = _Job(model, inputs, ratio, profile)
    steps: dict[str, Callable[[], None]] = {
        "create": run.create,
        "training": run.train,
        "evaluation": run.evaluate,
        "restore": run.restore,
        "save": run.save,
        "ONNX": run.compare,
    }
    with tempfile.TemporaryDirectory() as folder:
        run.folder = Path(folder)
        for stage, step in steps.items():
            try:
                step()
            except Exception as error:
                run.result = replace(run.result, stage=stage, error=describe(error).replace(f"{folder}/", ""))
                if stage != "restore":
                    break
            if stage == "create":
                weights, products = shares(model, run.compressed, layers)
                run.result = replace(
                    run.result, weights=weights, macs=products, first_line=str(amct.explain(run.compressed).coverage)
                )
    return run.result


def shares(model: nn.Module, compressed: nn.Module, layers: Layers) -> tuple[float, float]:
    """Shares of weights and of multiplications that are quantised, the latter as `explain` tells.

    Weights are parameters of two dimensions or more that the outputs depend on, but for embeddings and tables of
    positions (one of the first dimension).
    """
    modules = dict(model.named_modules())
    explanation = amct.explain(compressed)
    quantised = {name for name, item in explanation.items() if item.quantised}
    total = done = 0
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        is_quantised = not quantised.isdisjoint({owner, name, name.removesuffix("_weight")})
        table = parameter.dim() < 2 or (parameter.shape[0] == 1 and not is_quantised)
        if name in layers.used and not table and not isinstance(modules[owner], _NOT_WEIGHTS):
            total += parameter.numel()
            done += parameter.numel() * is_quantised
    return done / max(total, 1), 1 - explanation.coverage.macs.get("float", 0.0)


class _Job:
    """The steps share the compressed model, its files, and its evaluation."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], ratio: float, profile: str = "AMCT") -> None:
        self.model, self.inputs, self.ratio, self.profile = model, inputs, ratio, profile
        self.result = Quantised()
        self.folder = Path()
        self.compressed: nn.Module = model
        self.paths = ("", "")
        self.wanted: list[Tensor] = []

    def create(self) -> None:
        self.paths = configuration(self.folder, self.ratio, profile=self.profile)
        try:
            self.compressed, seconds = timed(self._create)
        except ValueError as error:
            if not nothing_to_prune(error):
                raise
            self.paths = configuration(self.folder, 0.0, profile=self.profile)
            self.compressed, seconds = timed(self._create)
        self.result = replace(self.result, create=seconds)

    def _create(self) -> nn.Module:
        return amct.create_compressed_retrain_model(copy.deepcopy(self.model), self.inputs, *self.paths)

    def train(self) -> None:
        """One step; a model that needs more than its inputs to train is calibrated by an evaluation."""
        optimizer = torch.optim.SGD(self.compressed.parameters(), lr=_RATE)
        try:
            results = call(self.compressed.train(), self.inputs)
        except Exception:
            amct.calibrate(self.compressed.eval(), [self.inputs])
            return
        losses = [result.float().square().mean() for result in results if result.requires_grad]
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(self.compressed.parameters(), 1.0)
        optimizer.step()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.wanted = call(self.compressed.eval(), self.inputs)

    def restore(self) -> None:
        checkpoint = self.folder / "checkpoint.pth"
        torch.save({"state_dict": self.compressed.state_dict()}, checkpoint)
        restored, seconds = timed(
            lambda: amct.restore_compressed_retrain_model(
                copy.deepcopy(self.model), self.inputs, *self.paths, str(checkpoint), "state_dict"
            )
        )
        with torch.no_grad():
            found = call(restored.eval(), self.inputs)
        same = len(found) == len(self.wanted) and all(map(same_bits, found, self.wanted))
        self.result = replace(self.result, restore=seconds, equal=same)

    def save(self) -> None:
        path = str(self.folder / "saved")
        _, seconds = timed(
            lambda: amct.save_compressed_retrain_model(self.compressed, self.paths[1], path, self.inputs)
        )
        self.result = replace(self.result, save=seconds)

    def compare(self) -> None:
        found = run_file(self.folder / "saved_fake_quant_model.onnx", self.inputs)
        noise = max(self._noise(seed) for seed in range(_DRAWS))
        self.result = replace(self.result, onnx=difference(found, self.wanted), noise=noise)

    def _noise(self, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)

        def disturb(_: nn.Module, arguments: object, result: object) -> object:
            if not (isinstance(result, Tensor) and result.is_floating_point()):
                return None
            return result * (1 + _ROUNDING * torch.randn(result.shape, generator=generator))

        quantised = {name for name, item in amct.explain(self.compressed).items() if item.quantised}
        modules = dict(self.compressed.named_modules())
        layers = [m for name, m in modules.items() if name in quantised or not any(m.children())]
        handles = [layer.register_forward_hook(disturb) for layer in layers]
        try:
            with torch.no_grad():
                return difference([tensor.numpy() for tensor in call(self.compressed, self.inputs)], self.wanted)
        finally:
            for handle in handles:
                handle.remove()


def timed(action: Callable[[], _T]) -> tuple[_T, float]:
    """The result and the seconds."""
    began = time.perf_counter()
    value = action()
    return value, round(time.perf_counter() - began, 2)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def run_file(path: Path, inputs: tuple[Any, ...]) -> list[np.ndarray[Any, Any]]:
    """Outputs of an ONNX file under onnxruntime. Errors: ValueError where it takes another number of inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = list(tensors_in(inputs))
    names = [item.name for item in session.get_inputs()]
    if len(names) != len(tensors):
        raise ValueError(f"the file takes {len(names)} inputs, the model {len(tensors)}")
    feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [np.asarray(value) for value in session.run(None, feeds)]


def difference(found: list[np.ndarray[Any, Any]], wanted: list[Tensor]) -> float:
    """Norm of the difference by that of the right output, the largest of all outputs; infinite where shapes differ."""
    if [array.shape for array in found] != [tuple(tensor.shape) for tensor in wanted]:
        return math.inf
    largest = 0.0
    for array, tensor in zip(found, wanted, strict=True):
        right = tensor.double().numpy()
        off = float(np.linalg.norm(array.astype(np.float64) - right))
        largest = max(largest, off / max(float(np.linalg.norm(right)), 1e-12))
    return largest
