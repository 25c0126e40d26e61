"""Reading checkpoints: never executed, every mismatch reported at once, nothing changed before all is known to fit."""

from __future__ import annotations

import contextlib
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.checkpoint import amct_names
from amct_ext.errors import CheckpointError, CheckpointKeyError, UnsafeCheckpointError
from amct_ext.layers.activation.calibration_data import is_resumable

_GATHERED = ".act_quant.calibration_data", ".hidden_quant.calibration_data"
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def read_state_dict(
    pth_file: str, state_dict_name: str | None = None, model_names: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Read a state dict from a checkpoint file, prefixes of DDP and torch.compile taken off.

    ``state_dict_name`` names the entry that holds it; without, the file itself is the state dict.
    ``model_names``: names of the model's parameters and buffers; a prefix that all of them begin with is not taken off.

    Errors:
    FileNotFoundError; UnsafeCheckpointError (a pickle.UnpicklingError) where the file holds more than tensors and
    plain containers; CheckpointKeyError (a KeyError) where the entry is missing or empty; CheckpointError (a
    RuntimeError) where it is no state dict, or holds anything but dense tensors with values.
    """
    try:
        content = torch.load(pth_file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint '{pth_file}' does not exist") from None
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"checkpoint '{pth_file}' holds more than tensors and plain containers, or is damaged; not executed; "
            f"save state dicts and plain values only ({str(error).splitlines()[0]})"
        ) from None
    except Exception as error:  # bytes that are none of torch's may end its reader in any way
        raise CheckpointError(
            f"checkpoint '{pth_file}' cannot be read (truncated, or no file of torch.save?): "
            f"{type(error).__name__}: {error}"
        ) from None
    if state_dict_name is not None:
        named = content.get(state_dict_name) if isinstance(content, Mapping) else None
        if named is None or (isinstance(named, Mapping) and not named):
            names = sorted(map(str, content)) if isinstance(content, Mapping) else []
            raise CheckpointKeyError(
                f"checkpoint '{pth_file}' has no (or an empty) entry '{state_dict_name}'; it has: "
                + ", ".join(names[:9])
            )
        content = named
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(
            f"checkpoint '{pth_file}' is no state dict; give the name of its entry as state_dict_name"
        )
    state = OrderedDict(content)
    versions = getattr(content, "_metadata", None)
    bare = [key for key, value in state.items() if not isinstance(value, Tensor) and not _is_extra(key)]
    if bare:
        raise CheckpointError(
            f"checkpoint '{pth_file}': '{bare[0]}' is no tensor; if the state dict is an entry of the file, name it as "
            "state_dict_name"
        )
    unusual = [
        (key, what) for key, value in state.items() if isinstance(value, Tensor) and (what := _why_not_loadable(value))
    ]
    if unusual:
        key, what = unusual[0]
        more = f" (and {len(unusual) - 1} more)" if len(unusual) > 1 else ""
        raise CheckpointError(
            f"checkpoint '{pth_file}': '{key}'{more} is {what}; save the state dict of the trained model, with dense "
            "tensors in memory"
        )
    own = set(model_names)
    for prefix in _WRAPPERS * 2:  # either may be around the other, or twice
        if state and all(key.startswith(prefix) for key in state) and not _is_own(prefix, state, own):
            state = OrderedDict((key[len(prefix) :], value) for key, value in state.items())
            versions = _without_prefix(versions, prefix.rstrip("."))
    if isinstance(versions, Mapping):
        vars(state)["_metadata"] = versions  # torch's own place for the versions of modules
    return state


def _is_own(prefix: str, state: Mapping[str, Tensor], own: set[str]) -> bool:
    """Whether a prefix of all keys is the name of the model's only child, and not that of a wrapper."""
    if not own:
        return False
    children = {name.partition(".")[0] for name in own}
    behind = {key.removeprefix(prefix).partition(".")[0] for key in state}
    expected = children | {wrapper.rstrip(".") for wrapper in _WRAPPERS}
    return prefix.rstrip(".") in children and (not own.isdisjoint(state) or not behind <= expected)


def _without_prefix(versions: object, prefix: str) -> object:
    """Versions of modules by name, with a wrapper's name taken off; the wrapper's own are left out."""
    if not isinstance(versions, Mapping):
        return versions
    inner = {key: value for key, value in versions.items() if key == prefix or str(key).startswith(f"{prefix}.")}
    return {str(key)[len(prefix) :].removeprefix("."): value for key, value in inner.items()}


def _is_extra(key: str) -> bool:
    """Whether an entry is what a module's own ``get_extra_state`` returned: anything."""
    return key.rpartition(".")[2] == "_extra_state"


def _why_not_loadable(value: Tensor) -> str:
    """What keeps a tensor from being copied into a parameter, '' for nothing."""
    if value.is_meta:
        return "on the meta device, without values"
    if value.is_nested or value.layout is not torch.strided:
        return "a nested tensor" if value.is_nested else f"stored as {value.layout}"
    return "quantised by torch" if value.is_quantized else ""


def load_checkpoint(model: nn.Module, pth_file: str, state_dict_name: str | None = None) -> None:
    """Load a checkpoint of ours or of AMCT into a compressed model, strictly.

    Errors: those of ``read_state_dict`` and ``load_state``.
    """
    load_state(model, read_state_dict(pth_file, state_dict_name, model.state_dict()), pth_file)


def load_state(model: nn.Module, state: Mapping[str, Tensor], pth_file: str) -> None:
    """Load what ``read_state_dict`` read from ``pth_file``.

    Errors: CheckpointError listing all missing, unexpected and misshapen entries, or what torch or a module of the
    user's says while it loads. The model is unchanged then, bit for bit.
    """
    if amct_names.has_amct_names(state):
        state = amct_names.from_amct_state_dict(model, state)
    problems = mismatches(model, state)
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"checkpoint '{pth_file}' does not fit ({len(problems)} mismatch(es)); it belongs to another model, "
            f"configuration or record:\n  {listed}"
        )
    with _unchanged_on_failure(model):
        try:
            versioned = OrderedDict(state)
            versions = getattr(state, "_metadata", None)  # modules may ask for them (torchvision's MNASNet)
            vars(versioned)["_metadata"] = versions or getattr(model.state_dict(), "_metadata", None)
            model.load_state_dict(versioned, strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"checkpoint '{pth_file}' cannot be loaded: {error}") from error


@contextlib.contextmanager
def _unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Give the model back its tensors, their values and its attributes where the block raises."""
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    held: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (holder, dict(holder))
        for module in model.modules()
        for holder in (vars(module), module._parameters, module._buffers)
    ]
    try:
        yield
    except BaseException:
        for holder, before in held:
            for name in [name for name in holder if name not in before]:
                del holder[name]
            for name, value in before.items():
                if holder.get(name) is not value:
                    holder[name] = value
        for tensor, values in tensors:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(values)
        raise


def mismatches(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Every entry that is missing, unexpected or of another shape, in the model's order."""
    own = model.state_dict()
    problems = [f"missing: {key} {_shape(value)}" for key, value in own.items() if key not in state]
    problems += [
        f"unexpected: {key} {_shape(value)}"
        for key, value in state.items()
        if key not in own and not key.endswith(_GATHERED)
    ]
    problems += [  # of an unfinished calibration, as version 0.1 kept it
        f"shape: {key} {_shape(value)} was gathered by another version; without this entry the calibration starts anew"
        for key, value in state.items()
        if key.endswith(_GATHERED) and not is_resumable(value)
    ]
    for key, value in own.items():
        if key not in state:
            continue
        if _is_extra(key):
            continue
        if _shape(state[key]) != _shape(value):
            problems.append(f"shape: {key} is {_shape(state[key])} in the checkpoint and {_shape(value)} in the model")
        elif _complex(state[key]) and not _complex(value):
            problems.append(f"dtype: {key} is {state[key].dtype} in the checkpoint and {value.dtype} in the model")
    return problems


def _complex(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_complex()


def _shape(value: object) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
