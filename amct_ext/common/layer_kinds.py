"""Layer classes: which modules are recorded as one node, and what class a subclass stands for."""

from __future__ import annotations

from torch import nn

# The names are the type strings used in plans, traits and messages.
LAYER_CLASSES: dict[str, type[nn.Module]] = {
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
    "ConvTranspose1d": nn.ConvTranspose1d,
    "ConvTranspose2d": nn.ConvTranspose2d,
    "ConvTranspose3d": nn.ConvTranspose3d,
    "Linear": nn.Linear,
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm3d": nn.BatchNorm3d,
    "SyncBatchNorm": nn.SyncBatchNorm,
}

CONVS = ("Conv1d", "Conv2d", "Conv3d")
TRANSPOSED_CONVS = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
BATCH_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
RNNS = ("LSTM", "GRU")
# Gates in ONNX order, by their places in torch's: LSTM input, output, forget, cell; GRU update, reset, new.
ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
# Layers whose activations and weights can be quantised, and (all of them among those) whose weights can be pruned.
QUANTIZABLE = ("Conv1d", "Conv2d", "Conv3d", "Linear", "ConvTranspose1d", "ConvTranspose2d", "LSTM", "GRU")
FILTER_PRUNABLE = ("Conv2d", "Linear")
SPARSE_PRUNABLE = ("Conv2d", "Linear", "ConvTranspose2d")

# Dimensions of a batched input; one less is the un-batched form that these classes also take.
BATCHED_DIMS = {
    "Conv1d": 3,
    "Conv2d": 4,
    "Conv3d": 5,
    "ConvTranspose1d": 3,
    "ConvTranspose2d": 4,
    "ConvTranspose3d": 5,
    "LSTM": 3,
    "GRU": 3,
}


def layer_type(module: nn.Module) -> str | None:
    """Name of the standard layer class that `module` is an instance of, or None."""
    for name, standard in LAYER_CLASSES.items():
        if isinstance(module, standard):
            return name
    return None


def keeps_forward(module: nn.Module) -> bool:
    """Whether a layer computes what its standard class does: no forward of its own, in its class or on the instance."""
    name = layer_type(module)
    if name is None:
        return False
    standard = LAYER_CLASSES[name]
    overridden = any(
        getattr(type(module), method, None) is not getattr(standard, method, None)
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
        plain = name in module._parameters and not hasattr(type(module), name)
        if not plain or (module._parameters[name] is None and name != "bias" and layer_type(module) not in BATCH_NORMS):
            return name
    return ""
