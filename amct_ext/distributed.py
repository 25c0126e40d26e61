"""Sharded training (FSDP2): the parameters that stay whole on every rank, and their gradients."""

from __future__ import annotations

from torch import nn

from amct_ext.common.ranks import all_reduce_mean_
from amct_ext.common.wrapping import unwrap
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.session import session_of


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The clips and learned scales of a compressed model: what must not be sharded, for forwards write to it.

        small = amct_ext.replicated_parameters(model)
        fully_shard(model, ignored_params=set(small))
        optimizer = SGD([{"params": [p for p in model.parameters() if isinstance(p, DTensor)]}, {"params": small}], lr)

    DistributedDataParallel needs none of this. In the order of the model's layers, each once. Errors: ModelError (not a
    compressed model).
    """
    inner = unwrap(model)
    session_of(inner)
    found: dict[int, nn.Parameter] = {}
    for _, layer in compressed_layers(inner):
        for name in layer.added_children:
            child = getattr(layer, name)
            found.update({id(p): p for p in child.parameters()} if child is not None else {})
    return list(found.values())


def average_gradients(model: nn.Module) -> None:
    """Average the gradients of ``replicated_parameters(model)`` over all ranks, by one collective.

    To be called on every rank between backward and the optimiser's step of a model sharded by ``fully_shard``, which
    leaves the gradients of ignored parameters alone. A missing gradient counts as zero. Does nothing in a job of one
    process. Errors: ModelError (not a compressed model).
    """
    gradients = []
    for p in replicated_parameters(model):
        if p.requires_grad:
            p.grad = p.new_zeros(p.shape) if p.grad is None else p.grad
            gradients.append(p.grad)
    all_reduce_mean_(gradients)
