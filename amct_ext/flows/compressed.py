"""The functions of the compressed flow: create, restore, save."""

from __future__ import annotations

from typing import Any

from torch import nn

from amct_ext.common.inference_mode import outside_inference_mode
from amct_ext.common.validation import check_callable, check_record_name, check_types
from amct_ext.common.wrapping import unwrap
from amct_ext.config.text import parse_config
from amct_ext.flows import build, saving
from amct_ext.model_surgery.session import session_of
from amct_ext.prune.gate_taylor import PruningLoss
from amct_ext.record.text import read_record


@outside_inference_mode
def create_compressed_retrain_model(
    model: nn.Module,
    input_data: Any,
    config_defination: str,
    record_file: str,
    *,
    pruning_loss: PruningLoss | None = None,
) -> nn.Module:
    """Return a pruned and/or 2:4-sparse, quantisation-aware copy of ``model``, ready to be retrained.

    ``input_data``: what ``model`` accepts, used to trace it: a tensor, a tuple (a dict at its end holds arguments by
    name, as for torch.onnx.export), or a dict by name. ``config_defination``: configuration text file.

    ``record_file``: written (atomically, once everything succeeded) with the channel groups and 2:4 masks. The eval
    phases of the returned model add the quantisation factors.

    ``pruning_loss``: for `importance: GATE_TAYLOR`. Given the float model (a copy in eval mode), it yields scalar
    losses, one per batch: ``lambda model: (loss(model(x), y) for x, y in batches)``. In a distributed job all ranks
    give one, and the mean of their measures counts.

    The caller's model is not changed. The copy keeps its train/eval mode and, where it was wrapped, its
    DistributedDataParallel wrapper. What a save will meet is told in a warning.

    Errors: TypeError (argument types), ValueError (configuration, record name, nothing to compress, GATE_TAYLOR without
    a loss), RuntimeError (the model rejects the input, or is compressed already; losses that are no finite scalars of
    the model). Source: AMCT's function of the same name; `pruning_loss` is ours.
    """
    check_types(model=(model, nn.Module), config_defination=(config_defination, str), record_file=(record_file, str))
    check_record_name(record_file)
    check_callable(pruning_loss=pruning_loss)
    planner = build.Planner.of(parse_config(config_defination), pruning_loss is not None)
    return build.create(model, input_data, planner, record_file, pruning_loss)


@outside_inference_mode
def restore_compressed_retrain_model(
    model: nn.Module,
    input_data: Any,
    config_defination: str,
    record_file: str,
    pth_file: str,
    state_dict_name: str | None = None,
) -> nn.Module:
    """Rebuild a compressed model from the float model, its configuration and record, and load a checkpoint into it.

    Arguments as for ``create_compressed_retrain_model``; ``pth_file`` is a checkpoint of ours or of AMCT,
    ``state_dict_name`` the entry that holds the state dict. Nothing is written. The result equals the saved model bit
    for bit; learned clips are not searched anew. Errors: those of create; FileNotFoundError; RecordError (a
    RuntimeError) where the record is damaged or of another model; those of
    ``amct_ext.checkpoint.load`` (``read_state_dict``, ``load_state``). Source: AMCT's function of the same name.
    """
    check_types(
        model=(model, nn.Module),
        config_defination=(config_defination, str),
        record_file=(record_file, str),
        pth_file=(pth_file, str),
        state_dict_name=(state_dict_name, str, type(None)),
    )
    check_record_name(record_file)
    planner = build.Planner.of(parse_config(config_defination))
    record = read_record(record_file)
    return build.restore(model, input_data, planner, record, record_file, pth_file, state_dict_name)


@outside_inference_mode
def save_compressed_retrain_model(
    model: nn.Module,
    record_file: str,
    save_path: str,
    input_data: Any,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    dynamic_axes: dict[str, Any] | None = None,
) -> None:
    """Write ``<save_path>_fake_quant_model.onnx`` and ``<save_path>_deploy_model.onnx`` of a retrained model.

    The factors come from ``record_file``, which must hold those of the model's present state (run a forward in eval
    mode first). A model without quantisation gives the plain graph in both files. The model is not changed and is
    exported in eval mode whatever its mode. Errors: TypeError, ValueError (names), RuntimeError (not a compressed
    model, record empty or stale, export). Source: AMCT's function of the same name.
    """
    check_types(model=(model, nn.Module), record_file=(record_file, str), save_path=(save_path, str))
    names = saving.export_names(input_names, output_names, dynamic_axes)
    check_record_name(record_file)
    inner = unwrap(model)
    session_of(inner)
    if saving.quantized_layers(inner):
        saving.save_quantized(inner, record_file, save_path, input_data, names)
    else:
        read_record(record_file)
        saving.save_float(inner, save_path, input_data, names)
