"""AMCT's state_dict names of a recurrent layer: to them and from them.

AMCT keeps the layer twice: ``replaced_module``, which it exports, and ``comp_module``, whose biases it trains. Both
hold the one trained layer here; on the way in the trained biases count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.recurrent.rnn import CompressedRNN
from amct_ext.layers.weight.quantizer import WeightQuantizer

_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
_ACTS = (("acts_", "act_quant"), ("acts_h_", "hidden_quant"))
_WEIGHTS = (("wts_", "weight_quant"), ("rec_wts_", "hidden_weight_quant"))
# Endings of AMCT's activation entries -> ours.
_PARAMS = {"clip_max": "clip_max", "clip_min": "clip_min"}
_PREVIOUS = {"clip_max_pre": "prev_clip_max", "clip_min_pre": "prev_clip_min"}
_FACTORS = {"scale": "scale", "offset": "offset"}


def amct_entries_of_rnn(name: str, layer: CompressedRNN, layer_count: int) -> dict[str, Tensor]:
    """AMCT's entries of one layer, in its order; ``layer_count``: quantised layers of the model that have run."""
    ran = weight_has_run(layer)
    device = layer.weight_ih_l0.device
    out: dict[str, Tensor] = {}
    scales = [layer.gate_scales(recurrent).detach().float() for recurrent in (False, True)]
    for ending, scale in zip("wr", scales, strict=True):
        out[f"{name}.scale_{ending}"] = scale.clone() if ran else torch.ones_like(scale)
    out |= {f"{name}.offset_{ending}": torch.zeros_like(scale) for ending, scale in zip("wr", scales, strict=True)}
    wrapper_prefix = f"{name}.quant_module."
    acts = [(wrapper_prefix + prefix, getattr(layer, child)) for prefix, child in _ACTS]
    _copy(out, acts, _PARAMS)
    for (prefix, child), scale in zip(_WEIGHTS, scales, strict=True):
        # What is trained, not the guarded value that is recorded: a restore must continue from it.
        own = getattr(layer, child).scale.detach().float()
        raw = own.expand_as(scale) if ran else torch.full_like(scale, float("nan"))
        out[f"{wrapper_prefix}{prefix}scales"] = raw.clone()
        out[f"{wrapper_prefix}{prefix}offsets"] = torch.zeros_like(raw) if ran else raw.clone()
    out[f"{wrapper_prefix}cur_batch"] = torch.tensor(float(ran), device=device)
    _copy(out, acts, _PREVIOUS)
    _copy(out, acts, _FACTORS)
    out[f"{wrapper_prefix}s_rec_flag"] = torch.tensor(0.0, device=device)
    for part in ("replaced_module", "comp_module"):
        out |= {f"{wrapper_prefix}{part}.{key}": getattr(layer, key).detach().clone() for key in _present(layer)}
    out |= {f"{wrapper_prefix}replaced_module.{key}": value for key, value in subclass_entries(layer).items()}
    out[f"{name}.record_module.quant_layer_num"] = torch.tensor(float(layer_count if ran else 0), device=device)
    return out


def subclass_entries(layer: CompressedLayer) -> dict[str, Tensor]:
    """State that a user's subclass adds to its layer: parameters, buffers, children, extra state; detached clones."""
    standard = {"weight", "bias", *_NAMES}
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else value
        for key, value in layer.state_dict().items()
        if key not in standard and key.partition(".")[0] not in layer.added_children
    }


def take_rnn(
    name: str, layer: CompressedRNN, rest: dict[str, Tensor], fallback: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Take the layer's entries out of ``rest`` and give them our names; ``fallback``: our present state.

    Entries of a missing half stay missing, so that the strict load reports them.
    """
    for key in [f"{name}.{kind}_{ending}" for kind in ("scale", "offset") for ending in "wr"]:
        rest.pop(key, None)
    rest.pop(f"{name}.record_module.quant_layer_num", None)
    wrapper_prefix = f"{name}.quant_module."
    taken = {key[len(wrapper_prefix) :]: rest.pop(key) for key in [k for k in rest if k.startswith(wrapper_prefix)]}
    out: dict[str, Tensor] = {}
    for key in _NAMES:
        first, second = (
            ("comp_module", "replaced_module") if key.startswith("bias") else ("replaced_module", "comp_module")
        )
        value = taken.get(f"{first}.{key}", taken.get(f"{second}.{key}"))
        if value is not None:
            out[f"{name}.{key}"] = value
    layer_prefix = "replaced_module."
    members = {key[len(layer_prefix) :]: value for key, value in taken.items() if key.startswith(layer_prefix)}
    out |= {f"{name}.{key}": value for key, value in members.items() if key not in _NAMES}
    known = {prefix + key for prefix, _ in _ACTS for key in (*_PARAMS, *_PREVIOUS, *_FACTORS)}
    known |= {prefix + key for prefix, _ in _WEIGHTS for key in ("scales", "offsets")}
    put_back(rest, wrapper_prefix, taken, known | {"cur_batch", "s_rec_flag"}, (layer_prefix, "comp_module."))
    for prefix, child in _ACTS:
        _take_activation(out, f"{name}.{child}.", taken, prefix, getattr(layer, child))
    ran = has_run(taken)
    for prefix, child in _WEIGHTS:
        if f"{prefix}scales" in taken:
            _take_weight(out, f"{name}.{child}.", taken[f"{prefix}scales"], ran, getattr(layer, child), fallback)
    return out


def put_back(
    rest: dict[str, Tensor], prefix: str, taken: Mapping[str, Tensor], known: set[str], parts: tuple[str, ...]
) -> None:
    """Return to ``rest`` what is none of AMCT's entries, nor below one of ``parts``: the strict load reports it."""
    rest |= {prefix + key: value for key, value in taken.items() if key not in known and not key.startswith(parts)}


def is_finite(value: Tensor) -> bool:
    """Whether every element is finite; the shape is checked later, with all the others."""
    return bool(torch.isfinite(value).all())


def has_run(taken: Mapping[str, Tensor]) -> bool:
    """Whether AMCT's wrapper with these entries has seen a forward."""
    return bool((taken.get("cur_batch", torch.tensor(0.0)) != 0).any())


def _copy(out: dict[str, Tensor], acts: list[tuple[str, ActivationQuantizer]], names: Mapping[str, str]) -> None:
    for prefix, quantizer in acts:
        out |= {prefix + amct_key: getattr(quantizer, key).detach().clone() for amct_key, key in names.items()}
        if names is _PARAMS and not quantizer.ready and int(quantizer.batches_seen) == 0:
            out[prefix + "clip_min"] = -out[prefix + "clip_max"]  # AMCT's start for recurrent layers


def _take_activation(
    out: dict[str, Tensor], child_prefix: str, taken: Mapping[str, Tensor], prefix: str, quantizer: ActivationQuantizer
) -> None:
    for amct_key, key in (_PARAMS | _PREVIOUS | _FACTORS).items():
        if prefix + amct_key in taken:
            out[child_prefix + key] = taken[prefix + amct_key]
    finite = all(prefix + key in taken and is_finite(taken[prefix + key]) for key in _PREVIOUS)
    if not finite and child_prefix + "clip_max" in out:  # AMCT's start is a range, ours is none
        out[child_prefix + "clip_min"] = out[child_prefix + "clip_max"]
    out[child_prefix + "batches_seen"] = torch.tensor(quantizer.batch_num if finite else 0)
    out[child_prefix + "invalid"] = torch.tensor(False)


def _take_weight(
    out: dict[str, Tensor],
    child_prefix: str,
    scales: Tensor,
    ran: bool,
    quantizer: WeightQuantizer,
    fallback: Mapping[str, Tensor],
) -> None:
    own = fallback[child_prefix + "scale"]
    # One scale for the whole weight stands once per gate in the file.
    scales = scales[:1] if own.numel() == 1 and scales.dim() else scales
    if quantizer.learned:
        # AMCT's own learned scales of recurrent layers are NaN: they start from the weight's range.
        ran = ran and is_finite(scales)
        out[child_prefix + "initialised"] = torch.tensor(ran)
        out[child_prefix + "scale"] = scales if ran else own
    else:
        out[child_prefix + "scale"] = scales


def _present(layer: CompressedRNN) -> list[str]:
    return [key for key in _NAMES if hasattr(layer, key)]


def weight_has_run(layer: CompressedLayer) -> bool:
    """Whether the layer's weight quantiser has seen a forward."""
    quantizer = layer.weight_quant
    if quantizer is None:
        return False
    return quantizer.ready if quantizer.learned else bool(torch.isfinite(quantizer.scale).all())
