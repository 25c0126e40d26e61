"""What was written has to load: both files are checked before one of them is replaced."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from amct_ext.errors import ExportError

_DEVICE_DOMAIN = "amct_ext.device"  # stands for the device's operators while a file is checked
_TOLERANCE = 0.1  # of the outputs' norm; ties that fall to the other side stay below it by far
logger = logging.getLogger("amct_ext")


def check_files(
    files: Mapping[Path, bytes],
    fake_quant: Path,
    deploy: Path,
    tensors: Mapping[str, torch.Tensor],
    expected: Sequence[torch.Tensor] | None,
) -> None:
    """Raise ExportError where one of the files would not load, or the fake-quant file not run on `tensors`, by name.

    The latter is tried where onnxruntime is installed. Outputs far from `expected` (the model's evaluation) are told in
    a warning: rounding ties and models that draw random numbers have a right to differ, so that is no error. Of the
    device's operators in the deploy file only the connections can be checked.
    """
    for path in (fake_quant, deploy):
        with _loadable(files, path, path == deploy) as source:
            try:
                onnx.checker.check_model(source)
            except Exception as error:
                raise ExportError(f"{path} would not be valid ONNX and is not written: {_first_line(error)}") from error
    with _loadable(files, fake_quant) as source:
        outputs = _run(source, fake_quant, tensors)
    if outputs is None or expected is None:
        return
    if len(outputs) != len(expected):
        raise ExportError(f"{fake_quant} would have {len(outputs)} outputs, the model returns {len(expected)} tensors")
    for index, (seen, wanted) in enumerate(zip(outputs, expected, strict=True)):
        problem = _difference(seen, wanted)
        if problem:
            logger.warning(
                "%s: output %d is not what the model computes for input_data: %s. Compare the two before the file is "
                "used; a model that draws random numbers, or results that hang on single rounding ties, differ rightly",
                fake_quant, index, problem,
            )  # fmt: skip


@contextlib.contextmanager
def _loadable(files: Mapping[Path, bytes], path: Path, device: bool = False) -> Iterator[bytes | str]:
    """What the checker and onnxruntime load: the bytes, or where tensors lie beside it, the path of a copy."""
    data = _with_device_domain(files[path]) if device else files[path]
    beside = {other: content for other, content in files.items() if other.suffix == ".external"}
    if not beside:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        for other, content in [*beside.items(), (path, data)]:
            (Path(folder) / other.name).write_bytes(content)
        yield str(Path(folder) / path.name)


def _with_device_domain(data: bytes) -> bytes:
    """The model with the device's operators in a domain of their own, where the checker asks for no schema."""
    model = onnx.load_from_string(data)
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    for node in model.graph.node:
        if not node.domain and node.op_type not in known:
            node.domain = _DEVICE_DOMAIN
    if all(entry.domain != _DEVICE_DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=_DEVICE_DOMAIN, version=1)
    return bytes(model.SerializeToString())


def _run(source: bytes | str, path: Path, tensors: Mapping[str, torch.Tensor]) -> list[np.ndarray] | None:
    """The outputs for the tensors; None where there is no runtime, or one without a kernel for an operator."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        # a traced file has no input for a tensor that only decided something
        feeds = {value.name: tensors[value.name].detach().cpu().numpy() for value in session.get_inputs()}
        return [np.asarray(output) for output in session.run(None, feeds)]
    except Exception as error:
        if type(error).__name__ == "NotImplemented":
            logger.warning("%s could not be tried, onnxruntime has no kernel for it: %s", path, _first_line(error))
            return None
        raise ExportError(f"{path} would not run in onnxruntime and is not written: {_first_line(error)}") from error


def _difference(seen: np.ndarray, wanted: torch.Tensor) -> str:
    if tuple(seen.shape) != tuple(wanted.shape):
        return f"its shape is {tuple(seen.shape)} instead of {tuple(wanted.shape)}"
    a, b = seen.astype(np.float64), wanted.detach().cpu().double().numpy()
    finite = np.isfinite(b)
    if (np.isnan(a) & finite).any():
        return "it holds NaN"
    a, b = np.where(finite, np.nan_to_num(a), 0), np.where(finite, b, 0)
    norm = float(np.linalg.norm(b))
    off = float(np.linalg.norm(a - b)) / norm if norm else float(np.abs(a).max(initial=0) > 1e-6)
    return f"it differs by {off:.0%} of the norm" if off > _TOLERANCE else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
