"""AMCT's state_dict names: to them and from them.

AMCT wraps a layer ``L`` (``L.quant_module.replaced_module.weight``), moves a following BatchNorm to ``L.bn_module``
and lists the quantiser of a shared input again under every layer that shares it. Counters of forwards that only matter
as zero / not zero are written as 0 or 1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from amct_ext.checkpoint.amct_names_rnn import (
    amct_entries_of_rnn,
    has_run,
    is_finite,
    put_back,
    subclass_entries,
    take_rnn,
    weight_has_run,
)
from amct_ext.common.validation import check_types
from amct_ext.common.wrapping import unwrap
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.recurrent.rnn import CompressedRNN
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.session import present_pairs, session_of

_MARK = ".replaced_module."
# AMCT's name -> ours, for the activation quantiser.
_ACT_PARAMS = {"acts_clip_max": "clip_max", "acts_clip_min": "clip_min"}
_ACT_BUFFERS = {
    "acts_clip_max_pre": "prev_clip_max",
    "acts_clip_min_pre": "prev_clip_min",
    "acts_scale": "scale",
    "acts_offset": "offset",
}
# AMCT's other entries of a layer's wrapper, whether they are needed here or not.
_WRAPPER_STATE = ("wts_scales", "wts_offsets", "wts_mask", "cur_batch", "prune_cur_batch", "s_rec_flag")


def has_amct_names(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of AMCT."""
    return any(_MARK in key for key in state)


def to_amct_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state dict of a compressed model under AMCT's names, in AMCT's order; AMCT's restore accepts it.

    Values are detached clones on the tensors' devices, float32 but for integer BatchNorm counters. Errors: ModelError
    for a model that was not made by create_* or restore_*.
    """
    model = unwrap(model)
    session_of(model)
    layers = dict(compressed_layers(model))
    pairs = present_pairs(model)
    norms = {norm: conv for conv, norm in pairs.items()}
    owners = _owners(layers)
    state: OrderedDict[str, Tensor] = OrderedDict()
    done: set[str] = set()
    own = model.state_dict()
    for key, value in own.items():
        holder = _holder(key, layers, norms)
        if holder is None:
            state[key] = value.detach().clone() if isinstance(value, Tensor) else value
        elif holder in layers and holder not in done:
            done.add(holder)
            norm = pairs.get(holder)
            state.update(_amct_entries_of_layer(holder, layers, owners))
            if norm is not None:
                bn_prefix = norm + "."
                state.update(
                    (f"{holder}.bn_module.{k[len(bn_prefix) :]}", v.detach().clone())
                    for k, v in own.items()
                    if k.startswith(bn_prefix)
                )
    return state


def from_amct_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate AMCT's names into those of ``model`` (a compressed model of the same configuration and record).

    Finite previous clips count as a finished calibration. Keys that have no place are passed on, so that the strict
    load reports them. Errors: ModelError, TypeError (an entry that is no tensor).
    """
    for key, value in state.items():
        check_types(**{f"state['{key}']": (value, object if key.endswith("_extra_state") else Tensor)})
    model = unwrap(model)
    session_of(model)
    layers = dict(compressed_layers(model))
    owners = _owners(layers)
    fallback = model.state_dict()
    rest = dict(state)
    out: dict[str, Tensor] = {}
    for name, layer in layers.items():
        out.update(_take_layer(name, layer, owners.get(name, name), rest, fallback))
    for conv, norm in present_pairs(model).items():
        bn_prefix = f"{conv}.bn_module."
        for key in [k for k in rest if k.startswith(bn_prefix)]:
            out[f"{norm}.{key[len(bn_prefix) :]}"] = rest.pop(key)
    out.update(rest)
    return out


def _owners(layers: Mapping[str, CompressedLayer]) -> dict[str, str]:
    """Sharing layer -> the layer that AMCT gives the quantiser to: the first registered of the group."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.input_quantizer is not None:
            groups.setdefault(id(layer.input_quantizer), []).append(name)
    return {name: group[0] for group in groups.values() if len(group) > 1 for name in group}


def _holder(key: str, layers: Mapping[str, CompressedLayer], norms: Mapping[str, str]) -> str | None:
    """The compressed layer or absorbed BatchNorm that a key of ours belongs to."""
    name = key
    while name:
        name = name.rpartition(".")[0]
        if name in layers or name in norms:
            return name
    return None


def _amct_entries_of_layer(
    name: str, layers: Mapping[str, CompressedLayer], owners: Mapping[str, str]
) -> dict[str, Tensor]:
    layer = layers[name]
    if layer.weight_quant is None:
        return {f"{name}.{key}": value for key, value in _amct_entries_of_wrapper(layer, False).items()}
    quantized = sum(other.weight_quant is not None for other in layers.values())
    if isinstance(layer, CompressedRNN):
        return amct_entries_of_rnn(name, layer, quantized)
    calibrated = layer.input_quantizer is not None and layer.input_quantizer.calibrated
    ran = weight_has_run(layer)
    present = layer.recorded_scale_w().float()
    recorded = present if ran else torch.ones_like(present)
    out = {f"{name}.scale_w": recorded.clone(), f"{name}.offset_w": torch.zeros_like(recorded)}
    owner = owners.get(name, name)
    out.update(
        {f"{name}.quant_module.{key}": value for key, value in _amct_entries_of_wrapper(layer, owner == name).items()}
    )
    if owner != name:
        reuse = _amct_entries_of_wrapper(layers[owner], True)
        out.update({f"{name}.quant_module.acts_comp_reuse.{key}": value for key, value in reuse.items()})
    count = quantized if calibrated and ran else 0
    out[f"{name}.record_module.quant_layer_num"] = torch.tensor(float(count), device=layer.weight.device)
    return out


def _amct_entries_of_wrapper(layer: CompressedLayer, with_activation: bool) -> dict[str, Tensor]:
    """The keys of AMCT's layer wrapper: parameters first, then buffers, then the layer itself."""
    device = layer.weight.device
    act, wts, sparsity = layer.input_quantizer, layer.weight_quant, layer.sparsity
    scales = torch.full((1,), float("nan"), device=device) if wts is None else wts.scale.detach().clone()
    if wts is not None and not weight_has_run(layer):
        scales.fill_(float("nan"))
    out: dict[str, Tensor] = {}
    if with_activation:
        out.update((amct_key, getattr(act, key).detach().clone()) for amct_key, key in _ACT_PARAMS.items())
    out["wts_scales"] = scales
    out["wts_offsets"] = torch.where(scales.isnan(), scales, torch.zeros_like(scales))
    ran = weight_has_run(layer) if wts is not None else sparsity is not None and int(sparsity.step) > 0
    out["cur_batch"] = _scalar(ran, device)
    if with_activation:
        out.update((amct_key, getattr(act, key).detach().clone()) for amct_key, key in _ACT_BUFFERS.items())
    out["prune_cur_batch"] = _scalar(0 if sparsity is None else int(sparsity.step), device)
    dense = torch.full_like(layer.weight, float("nan"), requires_grad=False)
    out["wts_mask"] = dense if sparsity is None else sparsity.mask.to(layer.weight.dtype)
    out["s_rec_flag"] = _scalar(0, device)
    out["replaced_module.weight"] = layer.weight.detach().clone()
    if layer.bias is not None:
        out["replaced_module.bias"] = layer.bias.detach().clone()
    out.update((f"replaced_module.{key}", value) for key, value in subclass_entries(layer).items())
    return out


def _masks_weights(mask: Tensor | None) -> bool:
    """Whether an entry of AMCT's is a mask that drops weights; NaN: there is none."""
    return mask is not None and bool((mask == 0).any())


def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(float(value), device=device)


def _take_layer(
    name: str, layer: CompressedLayer, owner: str, rest: dict[str, Tensor], fallback: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Take the layer's keys out of ``rest``; ``fallback`` supplies our state that AMCT does not have."""
    if isinstance(layer, CompressedRNN):
        return take_rnn(name, layer, rest, fallback)
    quantized = layer.weight_quant is not None
    wrapper_prefix = f"{name}.quant_module." if quantized else f"{name}."
    out: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}
    for key in [k for k in rest if k.startswith(wrapper_prefix) and not k.startswith(f"{name}.bn_module.")]:
        taken[key[len(wrapper_prefix) :]] = rest.pop(key)
    for key in (f"{name}.scale_w", f"{name}.offset_w", f"{name}.record_module.quant_layer_num"):
        rest.pop(key, None)
    layer_prefix = "replaced_module."
    out.update(
        (f"{name}.{key[len(layer_prefix) :]}", value) for key, value in taken.items() if key.startswith(layer_prefix)
    )
    known = {*_ACT_PARAMS, *_ACT_BUFFERS, *_WRAPPER_STATE}
    if layer.sparsity is None and _masks_weights(taken.get("wts_mask")):
        known.discard("wts_mask")
    put_back(rest, wrapper_prefix, taken, known, (layer_prefix, "acts_comp_reuse."))
    if layer.act_quant is not None:
        # AMCT may keep the shared quantiser at another layer; every follower carries a copy.
        shared_prefix = "" if owner == name else "acts_comp_reuse."
        child_prefix = f"{name}.act_quant."
        for amct_key, key in (_ACT_PARAMS | _ACT_BUFFERS).items():
            if shared_prefix + amct_key in taken:
                out[child_prefix + key] = taken[shared_prefix + amct_key]
        finite = all(shared_prefix + k in taken and is_finite(taken[shared_prefix + k]) for k in list(_ACT_BUFFERS)[:2])
        out[child_prefix + "batches_seen"] = torch.tensor(layer.act_quant.batch_num if finite else 0)
        out[child_prefix + "invalid"] = torch.tensor(False)
    if layer.weight_quant is not None and "wts_scales" in taken:
        ran = has_run(taken) and is_finite(taken["wts_scales"])
        child_prefix = f"{name}.weight_quant."
        if layer.weight_quant.learned:
            out[child_prefix + "scale"] = taken["wts_scales"] if ran else fallback[child_prefix + "scale"]
            out[child_prefix + "initialised"] = torch.tensor(ran)
        else:
            out[child_prefix + "scale"] = taken["wts_scales"]
        out.update((k, torch.zeros_like(fallback[k])) for k in fallback if k.startswith(f"{name}.search_n."))
    if layer.sparsity is not None and {"wts_mask", "prune_cur_batch"} <= set(taken):
        child_prefix, mask = f"{name}.sparsity.", taken["wts_mask"]
        # A wrapper that never ran has no mask yet; the one made from record or weights stays.
        out[child_prefix + "mask"] = fallback[child_prefix + "mask"] if mask.isnan().any() else mask.bool()
        out[child_prefix + "step"] = taken["prune_cur_batch"].to(torch.int64)
    return out
