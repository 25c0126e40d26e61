"""Checks of create and restore, logged or raised: layers that stay float, pruning without effect, exports."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from amct_ext.common.layer_kinds import QUANTIZABLE, keeps_forward
from amct_ext.common.wrapping import unwrap
from amct_ext.config.plan import Plan
from amct_ext.config.text import FilterPrune, SparsePrune
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ConfigError, InputDataError
from amct_ext.explain.reasons import layer_reasons
from amct_ext.explain.report import model_coverage
from amct_ext.export.capture import format_risks
from amct_ext.export.write import try_capture
from amct_ext.graph.export_risks import exportable_submodules
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.trace import Graph
from amct_ext.model_surgery.lookup import planned_layers
from amct_ext.model_surgery.session import Session, session_of
from amct_ext.prune.gate_taylor import PruningLoss
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.selection import measure_of

logger = logging.getLogger("amct_ext")
_MAX_LISTED = 9  # layers named in a message
_MAX_PARTS = 3
# Methods by which networks of branches merge them for deployment (RepVGG; MobileOne, timm; RepViT, YOLO).
_MERGING = ("switch_to_deploy", "reparameterize", "fuse", "fuse_convs")
_MIN_QUANTIZED_SHARE = 0.9  # of the weights; where less is quantised, create warns


def warn_of_excluded(graph: Graph) -> None:
    """Log the layers that ran and are not to be compressed, with the reason."""
    for name in graph.calls:
        if name in graph.excluded:
            logger.warning("layer '%s' is left as it is: %s", name, graph.excluded[name])


def warn_of_merging(model: nn.Module, plan: Plan) -> None:
    """Log blocks with branches to be compressed and a method that merges them into one layer (RepVGG, MobileOne)."""
    planned = [layer.name for layer in planned_layers(plan)]
    blocks: dict[tuple[str, str], list[str]] = {}
    inner: list[str] = []
    for name, module in reversed(list(model.named_modules())):  # what is inside comes before what holds it
        method = next((method for method in _MERGING if callable(getattr(type(module), method, None))), "")
        if not method:
            continue
        prefix = f"{name}." if name else ""
        branches = sum(layer.startswith(prefix) for layer in planned)
        if branches > 1 and not any(other.startswith(prefix) for other in inner):
            blocks.setdefault((type(module).__name__, method), []).append(name)
            inner.append(name)
    for (cls, method), names in blocks.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        logger.warning(
            "'%s'%s (%s): %s() merges layers that are compressed one by one. Call it before create, or not at all: "
            "merged later they are a float layer in the files, without what was learned of their ranges",
            names[-1], more, cls, method,
        )  # fmt: skip


def check_called_once(graph: Graph, inputs: Inputs) -> None:
    """Raise InputDataError where a list of several items is all that makes the layers run several times."""
    counts = [len(calls) for calls in graph.calls.values() if calls[0].op in QUANTIZABLE]
    for value in (*inputs.args, *inputs.kwargs.values()):
        items = len(value) if isinstance(value, (list, tuple)) else 0
        if items > 1 and counts and all(count % items == 0 for count in counts):
            raise InputDataError(
                f"input_data holds a list of {items} items and the model runs once for each, so no layer can be "
                "compressed: a layer has to run once in a forward. Give create and save a list of one item"
            )


def uncalled_layers(model: nn.Module, graph: Graph, traits: Mapping[str, LayerTraits]) -> dict[str, str]:
    """Layers whose parameters are used without calling the layer -> why nothing can be done to them.

    Also warns of layers of the caller's model that ran in the copy's forward: the model holds them in a way that no
    copy can follow (a global variable, a class attribute, a closure over objects).
    """
    foreign = {id(parameter) for parameter in graph.foreign}
    read = {name.rpartition(".")[0] for name in graph.parameter_readers()}
    reason = "the forward uses its parameters without calling the layer (layer.forward(x), or a function of the weight)"
    layers = dict(unwrap(model).named_modules())
    uncalled = [name for name in traits if name in read and name not in graph.calls and keeps_forward(layers[name])]
    uncalled = [name for name in uncalled if name not in graph.products]
    found = dict.fromkeys(uncalled, reason)
    for name, layer in layers.items():
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        if name in traits and name not in graph.calls and own & foreign:
            reason = "the forward runs the caller's own layer, held by something that is no attribute of the model"
            logger.warning("layer '%s' is left float and is not trained by the copy: %s", name, reason)
            found[name] = reason
    return found


def check_pruning_loss(groups: Sequence[ChannelGroup], plan: Plan, given: PruningLoss | None, source: str) -> None:
    """Raise ConfigError where channels are to be ranked by a loss that was not given; warn of one that ranks none."""
    asked = [group.producers[0].name for group in groups if measure_of(group, plan) == "GATE_TAYLOR"]
    if asked and given is None:
        raise ConfigError(
            f"{source}: '{asked[0]}' is to be pruned by importance: GATE_TAYLOR, which needs a loss; give create "
            "pruning_loss=lambda model: (loss(model(x), y) for x, y in batches), or choose GROUP_L2"
        )
    if given is not None and groups and not asked:
        logger.warning(
            "%s: pruning_loss has no effect, for no layer that can be pruned asks for importance: GATE_TAYLOR", source
        )


def log_coverage(model: nn.Module) -> None:
    """Log how much of a compressed model is quantised, as a warning where it is little."""
    if not session_of(model).plan.quant_active:
        return
    coverage = model_coverage(model)
    level = logging.INFO if coverage.quantised >= _MIN_QUANTIZED_SHARE else logging.WARNING
    more = "" if level == logging.INFO else " (amct_ext.explain(model) says why)"
    logger.log(level, "%s: %s%s", type(model).__name__, coverage, more)


def check_pruned(session: Session, source: str) -> None:
    """Raise ConfigError where pruning is asked for and no group of channels may lose any, nor a layer is 2:4 sparse."""
    layers = session.plan.layers.values()
    asked = [layer.name for layer in layers if isinstance(layer.prune, FilterPrune)]
    if not asked or any(isinstance(layer.prune, SparsePrune) for layer in layers):
        return
    if session.channel_records:
        if not any(node.prune_index for record in session.channel_records for node in record.producers):
            logger.warning("%s: prune_ratio and rounding (ascend_optimized: multiples of 16) keep all channels", source)
        return
    dropped = "the pruned model would fail or differ (see the log)"
    lines = [f"{name}: {layer_reasons(session, name).not_pruned or dropped}" for name in asked]
    if len(lines) > _MAX_LISTED:
        lines[_MAX_LISTED:] = [f"and {len(lines) - _MAX_LISTED} more (amct_ext.explain lists them)"]
    raise ConfigError(
        f"{source}: channel pruning is asked for, but no layer can lose channels, nothing is left to prune:\n  "
        + "\n  ".join(lines)
    )


def export_note(model: nn.Module, graph: Graph, input_data: Any) -> str:
    """What there is to know of a save before the training, logged as a warning too; '' where nothing is.

    The export is tried only where the trace has a location that may break it: a try takes longer than the rest of
    create.
    """
    if not graph.export_risks:
        return ""
    fixed = [risk for risk in graph.export_risks if risk.specializes]
    try:
        # torch.export may take a minute to fail on data-dependent branches
        traced = try_capture(model, input_data, trace_first=bool(fixed))
        if not fixed and not traced:
            return ""
        note = (
            "save may trace one forward: sizes, branches and numbers that forward takes from tensors "
            f"({format_risks(fixed or graph.export_risks)}) are constants in the files then, those of input_data"
        )
    except Exception as error:  # whatever it is, save would meet it too
        note = (
            f"this model cannot be exported, so save will fail: {error}\nWhat may be in the way: "
            f"{format_risks(graph.export_risks)}. Take it out of forward, or create, train in the model and save only "
            "a part without it"
        )
        parts = exportable_submodules(graph.export_risks, list(graph.calls))
        note += f", such as {', '.join(map(repr, parts[:_MAX_PARTS]))}" if parts else ""
    logger.warning("%s: %s", type(model).__name__, note)
    return note
