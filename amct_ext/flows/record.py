"""What a compressed model has found so far: its record, written now, and the shifts of its accumulators."""

from __future__ import annotations

from torch import nn

from amct_ext.common.wrapping import unwrap
from amct_ext.model_surgery.batchnorm_links import link_batchnorms
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.record_factors import write_record
from amct_ext.model_surgery.session import session_of


def update_record(model: nn.Module, record_file: str | None = None) -> None:
    """Write the record of the model as it is now: channel groups, present masks and, once calibrated, present factors.

    ``record_file``: where to (default: the file given at create or restore). A copy of a compressed model has no file
    of its own, so that it never writes to that of the model it was made of; the first one given here becomes its own.
    Errors: ModelError (also a copy without a file), InvalidDataError, OSError.
    """
    write_record(unwrap(model), record_file)


def shift_bits(model: nn.Module) -> dict[str, list[int]]:
    """The searchN result: layer -> right shifts N (1..16), one per recorded weight scale.

    Gathered by the evaluation forwards since the last training forward. Errors: ModelError, StaleStateError (no
    evaluation yet).
    """
    inner = unwrap(model)
    link_batchnorms(inner, session_of(inner).conv_bn)
    layers = ((name, layer) for name, layer in compressed_layers(inner) if layer.search_n is not None)
    return {
        name: layer.search_n.result(name, layer.deq_scale()) for name, layer in layers if layer.search_n is not None
    }
