"""Settings of one compressed model; never of the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn

from amct_ext.common.wrapping import unwrap
from amct_ext.errors import StaleStateError
from amct_ext.layers.activation.calibration_data import CalibrationMethod, ExactValues, ValueHistogram
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.products import integer_support, prepared_forward
from amct_ext.layers.products.path_choice import PathChoice
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.session import session_of

Forward = Literal["float", "auto", "integer", "prepared"]
_CALIBRATION_METHODS: dict[str, type[CalibrationMethod]] = {"exact": ExactValues, "histogram": ValueHistogram}


def configure(
    model: nn.Module,
    *,
    validation: Literal["deferred", "eager"] | None = None,
    stash: Literal["rebuild", "off"] | None = None,
    forward: Forward | Mapping[str, Forward] | None = None,
    calibration: Literal["exact", "histogram"] | None = None,
    fuse: Literal["auto", "off"] | None = None,
) -> None:
    """Change settings of a compressed model; what is not given stays as it is.

    ``validation``: when NaN or Inf in an activation raises.

    * "deferred" (how a model starts): noted on the device, raised by the next evaluation, state_dict() or save. A
      training step reads nothing back.
    * "eager": raised in the very forward.

    ``stash``: what convolutions and linear layers keep of their quantised input for backward.

    * "rebuild" (how a model starts): nothing, not even codes. Backward rounds the float input again, which the gradient
      of the clips needs anyway. The bits are the same, the memory is that of the float model.
    * "off": the quantised input, as floats.

    ``forward``: what convolutions and linear layers multiply, for the model or by layer name.

    * "float" (how a model starts): fake-quantised floats, as AMCT does.
    * "integer": 8-bit codes where there is a kernel (float32 on the CPU; not in compiled graphs nor under autocast).
      Sums are exact and rounded once. Gradients are those of "float", and nothing is kept whatever ``stash`` says.
    * "prepared": as "float", but an evaluation without gradients multiplies by weights that are packed once for oneDNN,
      with the BatchNorm that follows in them (float32 on the CPU; not in compiled graphs nor under autocast).
    * "auto": the paths are timed when a layer first meets a shape, and the fastest one is taken.

    Evaluations on integers or prepared floats keep the packed weight until a training step, a change of the parameter,
    or a call of train() or eval(). Torch does not count a change through ``weight.data`` (an exchange with averaged
    weights). It is found by looking at the weight: at all of it up to 4096 values or where it meets 4096 positions of
    the input, else at an even sample. After writing a few values of a larger one so, call eval(). These evaluations
    also compute BatchNorm, activation functions and additions together with the convolution before them, rounding once
    instead of at each step; forward hooks in the model then see tensors whose values are computed when they are read.

    ``calibration``: how batches are gathered where ``batch_num`` is above 1.

    * "exact" (how a model starts): all values are kept until the last batch.
    * "histogram": 4.8 MiB per quantiser however many batches there are. The range found is within the bound of
      `ops.search_clip_range_histogram`. A calibration in progress may change to it at any time; begun as a histogram it
      ends as one, also in a model restored with "exact", for the values are gone.

    ``fuse``: the ops behind a convolution that a BatchNorm follows.

    * "auto" (how a model starts): on the CPU, in float32 and outside of compiled graphs, BatchNorm, an activation
      function (ReLU, bounds, Hardswish) or an addition, and the quantisation for the next layer run in one pass,
      forward and backward, and only the convolution's output is kept, where that has 2^18 values or more. Outputs have
      the bits of torch's ops, gradients differ by their rounding.
    * "off": torch's ops, one by one.

    Errors: ValueError (unknown value or layer), ModelError (not a compressed model), StaleStateError ("exact" where a
    histogram has begun); nothing is changed then.
    """
    if validation not in (None, "deferred", "eager"):
        raise ValueError(f"validation must be 'deferred' or 'eager', not {validation!r}")
    if stash not in (None, "rebuild", "off"):
        raise ValueError(f"stash must be 'rebuild' or 'off', not {stash!r}")
    if calibration not in (None, *_CALIBRATION_METHODS):
        raise ValueError(f"calibration must be 'exact' or 'histogram', not {calibration!r}")
    if fuse not in (None, "auto", "off"):
        raise ValueError(f"fuse must be 'auto' or 'off', not {fuse!r}")
    inner = unwrap(model)
    session = session_of(inner)
    layers = dict(compressed_layers(inner))
    wanted = _per_layer(forward, layers)
    quantizers = [quantizer for layer in layers.values() for quantizer in layer.own_quantizers]
    if calibration == "exact":
        _check_values_are_there(quantizers)
    for name, path in wanted.items():
        layers[name].product_choice = PathChoice(path, session.tracker) if _has_path(layers[name], path) else None
    if fuse is not None:
        for layer in layers.values():
            layer.refs.fuse_allowed = fuse == "auto"
    for quantizer in quantizers:
        if validation is not None:
            quantizer.validate_now = validation == "eager"
        if stash is not None:
            quantizer.stash = stash == "rebuild"
        if calibration is not None:
            quantizer.calibration.method = _CALIBRATION_METHODS[calibration]()


def _check_values_are_there(quantizers: list[ActivationQuantizer]) -> None:
    begun = [q.layer for q in quantizers if q.calibration.is_histogram]
    if begun:
        raise StaleStateError(
            f"layer '{begun[0]}': its calibration has begun as a histogram, which does not hold the values; let it "
            'finish with calibration="histogram", or create the model anew'
        )


def _has_path(layer: CompressedLayer, path: Forward) -> bool:
    """Whether ``path``, or one that "auto" may choose, is another one than floats for some inputs of ``layer``."""
    return (path in ("auto", "integer") and integer_support.unsupported_reason(layer) is None) or (
        path in ("auto", "prepared") and prepared_forward.unsupported_reason(layer) is None
    )


def _per_layer(
    forward: Forward | Mapping[str, Forward] | None, layers: Mapping[str, CompressedLayer]
) -> dict[str, Forward]:
    if forward is None:
        return {}
    wanted = dict(forward) if isinstance(forward, Mapping) else dict.fromkeys(layers, forward)
    for name, value in wanted.items():
        if value not in ("float", "auto", "integer", "prepared"):
            raise ValueError(f"forward must be 'float', 'auto', 'integer' or 'prepared', not {value!r}")
        if name not in layers:
            raise ValueError(f"forward: the model has no compressed layer '{name}'")
    return wanted


def forward_choices(model: nn.Module) -> dict[str, Forward]:
    """Which forward each compressed layer took last: layer -> "integer", "prepared" or "float".

    `configure(model, forward=...)` takes the result: what "auto" chose in one run, another run repeats. Errors:
    ModelError.
    """
    inner = unwrap(model)
    session_of(inner)
    choices = ((name, layer.product_choice) for name, layer in compressed_layers(inner))
    return {name: "float" if choice is None else choice.used for name, choice in choices}
