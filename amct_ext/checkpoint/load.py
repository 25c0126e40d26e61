"""Reading checkpoints: never executed, every mismatch reported at once, nothing changed before all is known to fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.checkpoint import dialect
from amct_ext.errors import CheckpointError, CheckpointKeyError, UnsafeCheckpointError
from amct_ext.layers.gathering import fits

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def read_state_dict(pth_file: str, state_dict_name: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a checkpoint file, prefixes of DDP and torch.compile taken off.

    ``state_dict_name`` names the entry that holds it; without, the file itself is the state dict. Errors:
    FileNotFoundError; UnsafeCheckpointError (a pickle.UnpicklingError) where the file holds more than tensors and
    plain containers; CheckpointKeyError (a KeyError) where the entry is missing or empty; CheckpointError (a
    RuntimeError) where it is no state dict.
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
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint '{pth_file}' cannot be read (truncated?): {error}") from None
    if state_dict_name is not None:
        named = content.get(state_dict_name) if isinstance(content, Mapping) else None
        if not named:
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
    state = dict(content)
    extra = "_extra_state"  # of modules with get_extra_state: whatever they return
    bare = [key for key, value in state.items() if not (isinstance(value, Tensor) or key.endswith(extra))]
    if bare:
        raise CheckpointError(
            f"checkpoint '{pth_file}': '{bare[0]}' is no tensor; if the state dict is an entry of the file, name it as "
            "state_dict_name"
        )
    for prefix in _WRAPPERS * 2:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def load_checkpoint(model: nn.Module, pth_file: str, state_dict_name: str | None = None) -> None:
    """Load a checkpoint of ours or of AMCT into a compressed model, strictly.

    Errors: those of ``read_state_dict`` and ``load_state``.
    """
    load_state(model, read_state_dict(pth_file, state_dict_name), pth_file)


def load_state(model: nn.Module, state: Mapping[str, Tensor], pth_file: str) -> None:
    """Load what ``read_state_dict`` read from ``pth_file``.

    Errors: CheckpointError listing all missing, unexpected and misshapen entries. Nothing is loaded unless everything
    fits.
    """
    if dialect.is_amct(state):
        state = dialect.from_amct_state_dict(model, state)
    problems = mismatches(model, state)
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"checkpoint '{pth_file}' does not fit ({len(problems)} mismatch(es)); it belongs to another model, "
            f"configuration or record:\n  {listed}"
        )
    model.load_state_dict(state, strict=True)


def mismatches(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Every entry that is missing, unexpected or of another shape, in the model's order."""
    own = model.state_dict()
    problems = [f"missing: {key} {_shape(value)}" for key, value in own.items() if key not in state]
    problems += [f"unexpected: {key} {_shape(value)}" for key, value in state.items() if key not in own]
    for key, value in own.items():
        if key not in state:
            continue
        if key.endswith(".calibration_data"):  # of an unfinished calibration; it has the size that it has
            if not fits(state[key]):
                problems.append(f"shape: {key} {_shape(state[key])} was not gathered by this version")
        elif _shape(state[key]) != _shape(value):
            problems.append(f"shape: {key} is {_shape(state[key])} in the checkpoint and {_shape(value)} in the model")
    return problems


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
