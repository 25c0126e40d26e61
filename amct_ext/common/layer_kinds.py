"""The layer types: one entry per class of torch with all that the package knows about it.

A module counts as the kind whose class it is an instance of. The names of the classes are the type strings of plans,
traits, records of a trace, and messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from torch import nn


class LayerFamily(Enum):
    """Layers that are computed, pruned and exported alike."""

    CONV = auto()
    TRANSPOSED_CONV = auto()
    LINEAR = auto()
    RNN = auto()
    BATCH_NORM = auto()


@dataclass(frozen=True)
class LayerKind:
    """A layer type.

    onnx: the ONNX operators that it becomes (Linear: Gemm on a 2-D input and with a bias, else MatMul).
    channel_axis: of its input and output. widths: attributes that hold the numbers of input and output channels.
    weight_axes: where input and output channels lie in each of its weights (with groups, those of one group).
    batched_dims: dimensions of a batched input, one less is the un-batched form; None where any number will do.
    per_channel: a weight takes one scale per output channel, else one in all.
    filter_prunable: it can lose output channels; input_prunable: input channels; sparse_prunable: it can be 2:4 sparse.
    beyond_amct: quantised with `profile: BEST` alone, for AMCT leaves it float.
    onnx_gates: gates in ONNX order, by their positions in torch's (LSTM: input, output, forget, cell; GRU: update,
    reset, new).
    """

    cls: type[nn.Module]
    family: LayerFamily
    onnx: tuple[str, ...]
    channel_axis: int
    widths: tuple[str, str]
    weight_axes: tuple[int, int]
    batched_dims: int | None = None
    quantizable: bool = False
    per_channel: bool = True
    filter_prunable: bool = False
    input_prunable: bool = False
    sparse_prunable: bool = False
    beyond_amct: bool = False
    onnx_gates: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.cls.__name__


def _conv(cls: type[nn.Module], dims: int) -> LayerKind:
    return LayerKind(
        cls, LayerFamily.CONV, ("Conv",), 1, ("in_channels", "out_channels"), (1, 0), dims,
        quantizable=True, filter_prunable=True, input_prunable=True, sparse_prunable=True,
    )  # fmt: skip


def _transposed(cls: type[nn.Module], dims: int, beyond_amct: bool = False) -> LayerKind:
    return LayerKind(
        cls, LayerFamily.TRANSPOSED_CONV, ("ConvTranspose",), 1, ("in_channels", "out_channels"), (0, 1), dims,
        quantizable=True, filter_prunable=True, input_prunable=True, sparse_prunable=True, beyond_amct=beyond_amct,
    )  # fmt: skip


def _linear(cls: type[nn.Module]) -> LayerKind:
    return LayerKind(
        cls, LayerFamily.LINEAR, ("Gemm", "MatMul"), -1, ("in_features", "out_features"), (1, 0),
        quantizable=True, per_channel=False, filter_prunable=True, input_prunable=True, sparse_prunable=True,
    )  # fmt: skip


def _rnn(cls: type[nn.Module], dims: int | None = 3, gates: tuple[int, ...] = ()) -> LayerKind:
    return LayerKind(
        cls, LayerFamily.RNN, (cls.__name__,), -1, ("input_size", "hidden_size"), (1, 0), dims,
        quantizable=bool(gates), onnx_gates=gates,
    )  # fmt: skip


def _batch_norm(cls: type[nn.Module]) -> LayerKind:
    widths = ("num_features", "num_features")
    return LayerKind(cls, LayerFamily.BATCH_NORM, ("BatchNormalization",), 1, widths, (0, 0), input_prunable=True)


# In the order in which messages list the types.
LAYER_KINDS = (
    _conv(nn.Conv1d, 3),
    _conv(nn.Conv2d, 4),
    _conv(nn.Conv3d, 5),
    _linear(nn.Linear),
    _transposed(nn.ConvTranspose2d, 4),
    _rnn(nn.LSTM, gates=(0, 3, 1, 2)),
    _rnn(nn.GRU, gates=(1, 0, 2)),
    _transposed(nn.ConvTranspose1d, 3),
    _transposed(nn.ConvTranspose3d, 5, beyond_amct=True),
    _rnn(nn.RNN, None),
    _batch_norm(nn.BatchNorm1d),
    _batch_norm(nn.BatchNorm2d),
    _batch_norm(nn.BatchNorm3d),
    _batch_norm(nn.SyncBatchNorm),
)
_BY_NAME = {kind.name: kind for kind in LAYER_KINDS}


def _of_family(family: LayerFamily) -> tuple[str, ...]:
    return tuple(kind.name for kind in LAYER_KINDS if kind.family is family)


CONVS = _of_family(LayerFamily.CONV)
TRANSPOSED_CONVS = _of_family(LayerFamily.TRANSPOSED_CONV)
BATCH_NORMS = _of_family(LayerFamily.BATCH_NORM)
BATCH_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")

QUANTIZABLE = tuple(kind.name for kind in LAYER_KINDS if kind.quantizable)
QUANTIZABLE_BY_AMCT = tuple(kind.name for kind in LAYER_KINDS if kind.quantizable and not kind.beyond_amct)
FILTER_PRUNABLE = tuple(kind.name for kind in LAYER_KINDS if kind.filter_prunable)
SPARSE_PRUNABLE = tuple(kind.name for kind in LAYER_KINDS if kind.sparse_prunable)
ONNX_GATES = {kind.name: kind.onnx_gates for kind in LAYER_KINDS if kind.onnx_gates}
# ONNX operators of the layers that keep their weight through an export: one product, whose weight is input 1.
PRODUCT_OPERATORS = frozenset(
    operator
    for kind in LAYER_KINDS
    if kind.family in (LayerFamily.CONV, LayerFamily.TRANSPOSED_CONV, LayerFamily.LINEAR)
    for operator in kind.onnx
)


def kind_named(name: str) -> LayerKind | None:
    """The kind of this name, None where it is that of no layer type (an op of a trace, say)."""
    return _BY_NAME.get(name)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind that `module` is an instance of, or None."""
    return next((kind for kind in LAYER_KINDS if isinstance(module, kind.cls)), None)


def output_axis(module: nn.Module) -> int:
    """Where the output channels of a convolution or linear layer lie in its weight."""
    kind = kind_of(module)
    assert kind is not None  # asked of layers only
    return kind.weight_axes[1]


def layer_type(module: nn.Module) -> str | None:
    """Name of the standard layer class that `module` is an instance of, or None."""
    kind = kind_of(module)
    return None if kind is None else kind.name


def keeps_forward(module: nn.Module) -> bool:
    """Whether a layer computes what its standard class does: no forward of its own, in its class or on the instance."""
    kind = kind_of(module)
    if kind is None:
        return False
    overridden = any(
        getattr(type(module), method, None) is not getattr(kind.cls, method, None)
        for method in ("forward", "_conv_forward", "__call__")
    )
    return not overridden and not {"forward", "_conv_forward"} & vars(module).keys()


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution works on each input channel alone. A plain convolution of one channel does not count."""
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", None)


def computed_parameter(module: nn.Module) -> str:
    """The weight or bias of a layer that a property, parametrisation or weight norm computes; '' where none is."""
    names = ["weight", "bias"]
    if isinstance(module, nn.RNNBase):
        names = [name for name in module._flat_weights_names if name.startswith(("weight", "bias"))]
    for name in names:
        if kind_of(module) is None and not hasattr(module, name):  # a module of the user's need not have a bias
            continue
        plain = name in module._parameters and not hasattr(type(module), name)
        if not plain or (module._parameters[name] is None and name != "bias" and layer_type(module) not in BATCH_NORMS):
            return name
    return ""
