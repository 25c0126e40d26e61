"""What a forward in train mode computes with parameters that evaluation does not read: auxiliary heads, above all."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from amct_ext.graph.inputs import Inputs
from amct_ext.graph.recorder import Recorder, Recording
from amct_ext.graph.values import Node


def record_training(model: nn.Module, inputs: Inputs, evaluated: Recording) -> Recording | None:
    """The part of a forward in train mode that has to do with parameters which the recorded evaluation does not read.

    The nodes that read them, what follows from these, and all that either is computed from. None where evaluation reads
    every parameter, where training reads none of the others, and where the model cannot run in train mode on these
    arguments. The model is left as it was.
    """
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    idle = set(parameters.values())
    for node in evaluated.nodes:
        idle.difference_update(_read_by(node, model, parameters))
    if not idle:
        return None
    inputs = inputs.copied()
    recorder = Recorder(model, inputs)
    try:
        recorded = recorder.recording(recorder.run(inputs, training=True))
    except Exception:  # one image and BatchNorm over a single pixel, or targets that a detector is trained with
        return None
    readers = {id(node) for node in recorded.nodes if not idle.isdisjoint(_read_by(node, model, parameters))}
    nodes = _part(recorded.nodes, readers)
    if not nodes:
        return None
    there = {id(value) for node in nodes for value in node.outputs}
    calls = {name: [node for node in nodes if node.module == name] for name in recorded.calls}
    return dataclasses.replace(
        recorded,
        nodes=nodes,
        outputs=tuple(value for value in recorded.outputs if id(value) in there),
        calls={name: called for name, called in calls.items() if called},
    )


def _read_by(node: Node, model: nn.Module, parameters: Mapping[str, int]) -> list[int]:
    """The parameters that a node reads; `parameters`: by name."""
    found = [parameters[value.name] for value in node.inputs if value is not None and value.kind == "parameter"]
    if node.module is not None or node.op == "scripted":
        found += map(id, model.get_submodule(node.module or node.name).parameters())
    return found


def _part(nodes: Sequence[Node], readers: Collection[int]) -> list[Node]:
    """Some of the nodes, by id, those that follow from them, and those that either are computed from."""
    wanted, touched = set(readers), set[int]()
    for node in nodes:
        if id(node) in wanted or any(id(value) in touched for value in node.inputs):
            wanted.add(id(node))
            touched.update(map(id, node.outputs))
    open_nodes = [node for node in nodes if id(node) in wanted]
    while open_nodes:
        for value in open_nodes.pop().inputs:
            maker = None if value is None else value.producer
            if maker is not None and id(maker) not in wanted:
                wanted.add(id(maker))
                open_nodes.append(maker)
    return [node for node in nodes if id(node) in wanted]
