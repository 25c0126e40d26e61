"""The optimizer's state of a job that runs in AMCT, for the model of that job here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.checkpoint.amct_names import to_amct_state_dict
from amct_ext.common.wrapping import unwrap
from amct_ext.errors import CheckpointError
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.recurrent.rnn import CompressedRNN
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.session import session_of

logger = logging.getLogger("amct_ext")
_REUSED = ".acts_comp_reuse."  # AMCT's second name of a shared quantiser; its parameters() leaves it out
_NOT_OPTIONS = ("params", "param_names")
# What torch's schedulers add to the options of a group.
_SCHEDULER_OPTIONS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}

Group = Mapping[str, Any]  # an entry of param_groups: parameters by number, and the optimizer's options
Entry = Mapping[str, object]  # the state of one parameter: tensors and numbers


def amct_parameters(model: nn.Module) -> dict[str, str | None]:
    """AMCT's parameters of a compressed model in the order of its ``parameters()`` -> ours; None: it is none here.

    AMCT counts scales and offsets of every weight as parameters, and recurrent layers twice. Errors: ModelError.
    """
    model = unwrap(model)
    session = session_of(model)
    names_by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    wrapped = {key: value for name, layer in compressed_layers(model) for key, value in _wrapped(name, layer)}
    for conv, norm in session.conv_bn.items():
        wrapped |= {f"{conv}.bn_module.{key}": value for key, value in model.get_submodule(norm).named_parameters()}
    own = dict(model.named_parameters())
    found: dict[str, str | None] = {}
    seen: set[int] = set()
    for key in to_amct_state_dict(model):
        if _REUSED in key or not (key in wrapped or key in own):
            continue
        parameter = wrapped[key] if key in wrapped else own[key]
        if parameter is None:
            found[key] = None
        elif id(parameter) not in seen:
            seen.add(id(parameter))
            found[key] = names_by_id[id(parameter)]
    return found


def _wrapped(name: str, layer: CompressedLayer) -> Iterator[tuple[str, nn.Parameter | None]]:
    """The parameters of AMCT's wrapper around a layer, as ours. Those it never trains are None."""
    comp = f"{name}." if layer.weight_quant is None else f"{name}.quant_module."
    recurrent = isinstance(layer, CompressedRNN)
    sides = {"acts_": layer.input_quantizer}
    if isinstance(layer, CompressedRNN):
        sides["acts_h_"] = layer.hidden_quant
    for prefix, quantizer in sides.items():
        if quantizer is not None:
            yield f"{comp}{prefix}clip_max", quantizer.clip_max
            yield f"{comp}{prefix}clip_min", quantizer.clip_min
    wts = layer.weight_quant
    learned = wts is not None and wts.learned and not recurrent
    yield f"{comp}wts_scales", wts.scale if learned and wts is not None else None  # type: ignore[misc]
    yield f"{comp}wts_offsets", None
    if recurrent:
        yield f"{comp}rec_wts_scales", None
        yield f"{comp}rec_wts_offsets", None
    for key, value in layer.named_parameters(recurse=False):
        twice = recurrent and key.startswith("bias")  # AMCT trains the biases of its second copy
        yield f"{comp}replaced_module.{key}", None if twice else value
        if recurrent:
            yield f"{comp}comp_module.{key}", value if twice else None


def from_amct_optimizer_state_dict(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Translate the ``state_dict()`` of an AMCT job's optimizer for ``optimizer.load_state_dict``.

    ``model``: the job's model, restored here. ``optimizer``: made anew over its parameters, of the same class and with
    the same grouping. ``names``: AMCT's parameter names in the order in which that optimizer got them, group after
    group; needed where it did not simply get ``model.parameters()`` and torch kept no names (``param_names``).

    Momentum buffers and moments of a parameter are those in ``state``, tensors not copied; a learned clip that layers
    share is one parameter on both sides. Groups get the options (learning rate, ...) of the group that their parameters
    were in. What has no parameter here is left out, and named in the log: a warning where it had a state, which AMCT
    gives only to what it trains. Nothing is changed. Errors: ModelError; ValueError (names that are needed or are not
    AMCT's, an optimizer of another kind or grouping); CheckpointError (no state of an optimizer, or of another shape).
    """
    inner = unwrap(model)
    our_names = amct_parameters(inner)
    if not _is_optimizer_state(state):
        given = type(state).__name__
        if isinstance(state, Mapping):
            given = f"a dict of {', '.join(map(str, state))[:200] or 'nothing'}"
        raise CheckpointError(f"state must be what an optimizer's state_dict() returned in AMCT's job, not {given}")
    groups = list(state["param_groups"])
    name_at = _names(groups, names, list(our_names))
    entries, group_of = _by_our_names(name_at, groups, state["state"], our_names)
    present = {id(parameter): name for name, parameter in inner.named_parameters()}
    result: dict[str, Any] = {"state": {}, "param_groups": []}
    without_state: list[str] = []
    index = 0
    for number, group in enumerate(optimizer.param_groups):
        parameters = [(present.get(id(parameter)), parameter) for parameter in group["params"]]
        options = _options(number, group, {group_of[name] for name, _ in parameters if name in group_of}, groups)
        positions = list(range(index, index + len(parameters)))
        index += len(parameters)
        result["param_groups"].append({**options, "params": positions})
        for position, (name, parameter) in zip(positions, parameters, strict=True):
            if name in entries:
                result["state"][position] = _checked(str(name), parameter, entries[name])
            elif name not in group_of:
                without_state.append("a parameter that is not the model's" if name is None else name)
    if without_state:
        logger.warning("no state for %s: there the optimizer starts anew", ", ".join(without_state))
    return result


def _is_optimizer_state(state: object) -> bool:
    if not isinstance(state, Mapping):
        return False
    groups, entries = state.get("param_groups"), state.get("state")
    if not isinstance(groups, (list, tuple)) or not groups or not isinstance(entries, Mapping):
        return False
    listed = all(isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups)
    return listed and all(isinstance(entry, Mapping) for entry in entries.values())


def _names(groups: Sequence[Group], names: Sequence[str] | None, order: list[str]) -> dict[int, str]:
    """Index in the optimizer -> AMCT's name."""
    positions = [position for group in groups for position in group["params"]]
    kept = [name for group in groups for name in group.get("param_names", ())]
    if names is None and len(kept) == len(positions):
        names = [name if name in order else name.removeprefix("module.").removeprefix("_orig_mod.") for name in kept]
    if names is None:
        if len(groups) > 1:
            raise ValueError(
                f"the optimizer's state has {len(groups)} groups, whose order the file does not tell: give names, "
                "AMCT's parameter names group after group"
            )
        names = order
    if len(names) != len(positions):
        raise ValueError(
            f"the optimizer's state has {len(positions)} parameters, AMCT's model {len(order)} "
            f"({len(names)} names given): it belongs to another model, or to a part of the parameters; give their names"
        )
    unknown = [name for name in names if name not in order]
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no parameter of AMCT's model; it has: {', '.join(order[:9])}, ...")
    return dict(zip(positions, names, strict=True))


def _by_our_names(
    name_at: Mapping[int, str],
    groups: Sequence[Group],
    states: Mapping[int, Entry],
    our_names: Mapping[str, str | None],
) -> tuple[dict[str | None, Entry], dict[str | None, int]]:
    """Our parameter -> its state, and -> the number of its group."""
    entries: dict[str | None, Entry] = {}
    group_of: dict[str | None, int] = {}
    dropped_without_state: list[str] = []
    dropped_with_state: list[str] = []
    for number, group in enumerate(groups):
        for position in group["params"]:
            name = our_names[name_at[position]]
            if name is None:
                (dropped_with_state if states.get(position) else dropped_without_state).append(name_at[position])
                continue
            group_of[name] = number
            if states.get(position):
                entries[name] = states[position]
    if dropped_without_state:
        logger.info("no parameters here, and without a state in AMCT: %s", ", ".join(dropped_without_state))
    if dropped_with_state:
        logger.warning("no parameters here, their optimizer state is left out: %s", ", ".join(dropped_with_state))
    return entries, group_of


def _options(number: int, group: Group, origins: set[int], groups: Sequence[Group]) -> dict[str, Any]:
    """The options of one of our groups: those of AMCT's group that its parameters come from."""
    own = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
    if "param_names" in group:
        own["param_names"] = group["param_names"]
    if not origins:
        return own
    if len(origins) > 1:
        raise ValueError(
            f"group {number} of the optimizer holds parameters of AMCT's groups {sorted(origins)}: group them alike"
        )
    recorded = {key: value for key, value in groups[origins.pop()].items() if key not in _NOT_OPTIONS}
    unknown = [key for key in recorded if key not in own and key not in _SCHEDULER_OPTIONS]
    if unknown:
        raise ValueError(f"the state is that of another kind of optimizer: its groups have '{unknown[0]}'")
    return own | recorded


def _checked(name: str, parameter: Tensor, entry: Entry) -> dict[str, object]:
    for key, value in entry.items():
        if isinstance(value, Tensor) and value.dim() and not _fits(value, parameter):
            raise CheckpointError(
                f"optimizer state {key} of {name} has the shape {tuple(value.shape)}, the parameter "
                f"{tuple(parameter.shape)}: it belongs to another model"
            )
    return dict(entry)


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """Whether a state can be that of a parameter: of its shape, or reduced along some axes (Adafactor)."""
    sizes = zip(value.shape, parameter.shape, strict=False)
    return value.dim() == parameter.dim() and all(size in (1, whole) for size, whole in sizes)
