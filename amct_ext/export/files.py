"""Where the two ONNX files go, and writing them: all or none."""

from __future__ import annotations

import itertools
import logging
import os
import re
from pathlib import Path

import onnx_ir as ir

from amct_ext.common.files import write_atomic

SIZE_LIMIT = 2_000_000_000  # bytes of a protobuf message, less than 2^31 so that the graph itself still fits
MAX_PREFIX_LENGTH = 241

logger = logging.getLogger("amct_ext")


def onnx_paths(save_path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The fake-quant and the deploy file of `save_path` = [folder/][prefix].

    Errors: ValueError (a prefix of more than 241 characters, a file name that is a folder).
    """
    folder, prefix = os.path.split(os.fspath(save_path))
    if len(prefix) > MAX_PREFIX_LENGTH:
        raise ValueError(
            f"save_path: the prefix has {len(prefix)} characters, at most {MAX_PREFIX_LENGTH} are possible"
        )
    stem = f"{prefix}_" if prefix else ""
    fake_quant, deploy = (Path(folder) / f"{stem}{kind}_model.onnx" for kind in ("fake_quant", "deploy"))
    for path in (fake_quant, deploy):
        if path.is_dir():
            raise ValueError(f"save_path: {path} is a folder; choose another prefix")
    return fake_quant, deploy


def encode(model: ir.Model, path: Path, suffix: str, limit: int = SIZE_LIMIT) -> dict[Path, bytes]:
    """The files that hold `model`: one, or with tensors of their own where `limit` bytes are reached.

    Then the largest initialisers move out, one file each, named `<file prefix><initialiser>_<suffix>.external`; the
    prefix keeps two exports in one folder apart, a number names that differ in what a file name cannot hold. `model` is
    changed to refer to them.
    """
    files: dict[Path, bytes] = {}
    taken: set[str] = set()  # in small letters: not every file system tells them from capital ones
    values = model.graph.initializers.items()
    tensors = {name: value.const_value for name, value in values if value.const_value is not None}
    size = sum(tensor.nbytes for tensor in tensors.values())
    prefix = path.name.removesuffix("_model.onnx").removesuffix("fake_quant").removesuffix("deploy")
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        if size < limit:
            break
        stem = re.sub(r"[^\w.-]", "_", f"{prefix}{name}")
        location = next(
            candidate
            for number in itertools.count()
            if (candidate := f"{stem}{f'_{number}' if number else ''}_{suffix}.external").lower() not in taken
        )
        taken.add(location.lower())
        data = tensor.tobytes()
        files[path.with_name(location)] = data
        size -= tensor.nbytes
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            location, 0, len(data), tensor.dtype, shape=ir.Shape(tensor.numpy().shape), name=name, base_dir=path.parent
        )
    files[path] = ir.to_proto(model).SerializeToString()
    return files


def write_files(files: dict[Path, bytes]) -> None:
    """Write every file atomically, in order: a model comes after the tensors that it refers to. Errors: OSError."""
    for path, data in files.items():
        if path.exists():
            logger.warning("%s exists and is overwritten", path)
        write_atomic(path, data)
