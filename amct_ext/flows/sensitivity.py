"""How much each quantised layer costs in accuracy, and which ones to leave at higher precision for a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import LayerFamily, kind_named, kind_of
from amct_ext.common.references import copy_model
from amct_ext.common.validation import check_types
from amct_ext.common.wrapping import unwrap
from amct_ext.errors import InvalidDataError, StaleStateError
from amct_ext.explain.sensitivity_report import LayerSensitivity, Sensitivity
from amct_ext.flows.calibrate import check_batches
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.run import tensors_in
from amct_ext.layers.classes import to_float
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.custom.folded_layer import folded_layer
from amct_ext.layers.product_call import ProductCall
from amct_ext.layers.recurrent.rnn import CompressedRNN
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.session import session_of

Forward = Callable[..., Any]
Loss = Callable[[nn.Module, Any], Tensor | float]


@torch.no_grad()
def sensitivity(model: nn.Module, loader: Iterable[Any], *, loss: Loss | None = None) -> Sensitivity:
    """Measure how far each quantised layer, alone, moves the output of the network; the result prints as a table.

        report = amct_ext.sensitivity(model, batches)
        print(report)
        print(report.configuration(0.1))  # at most 10 % of the multiplications above 8 bits

    ``model``: compressed and calibrated. ``loader``: some batches, each in a form that create takes as ``input_data``,
    on the model's device; all are used, 2 evaluations per layer and batch.

    A layer's error compares the output with this layer quantised, all others float, with the float output: the squared
    difference relative to the latter's square, all floating tensors of the output together. With ``loss``, ``(model,
    batch) -> scalar``, it is how much the mean loss rises; batches may then have any form. Errors of layers add up to
    about that of the whole where they are small. 2:4 masks count as part of the float layer.

    The evaluations run on a copy of the model; nothing of ``model`` or its record changes. Errors: ModelError (not a
    compressed model), StaleStateError (not calibrated), TypeError (one batch instead of several), ValueError (no batch,
    nothing quantised), InvalidDataError (an output without floating tensors). Source: layer-wise sensitivity analysis
    as in HAWQ (Dong et al. 2019), measured instead of estimated by curvature.
    """
    check_types(model=(model, nn.Module))
    check_batches(loader)
    session_of(unwrap(model))
    network = copy_model(unwrap(model)).eval()
    layers = {name: layer for name, layer in compressed_layers(network) if layer.weight_quantizers}
    _check_ready(layers)
    for layer in layers.values():
        layer.search_n, layer.product_choice = None, None
    measure = _Measurement(network, layers, loss)
    for batch in loader:
        measure.add(batch)
    if not measure.batches:
        raise ValueError("loader holds no batch, so there is nothing to measure with")
    return measure.result()


class _Measurement:
    """Errors gathered over batches."""

    def __init__(
        self,
        network: nn.Module,
        layers: dict[str, CompressedLayer],
        loss: Loss | None,
    ) -> None:
        self.network, self.layers, self.loss = network, layers, loss
        self._counting = False
        self.of_float = {name: _float_layers(layer, partial(self._count, name)) for name, layer in layers.items()}
        self.batches = 0
        self._macs = dict.fromkeys(layers, 0)
        self._whole = 0.0
        self._own, self._weights = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def add(self, batch: Any) -> None:
        """Measure every layer on one batch."""
        exact = {name: plain for name, (plain, _) in self.of_float.items()}
        with self._counted(), _forwards(self.layers, exact):
            reference = self._run(batch)
        self._whole += self._error(self._run(batch), reference)
        for name in self.layers:
            others = {key: plain for key, plain in exact.items() if key != name}
            with _forwards(self.layers, others):
                self._own[name] += self._error(self._run(batch), reference)
            with _forwards(self.layers, {**others, name: self.of_float[name][1]}):
                self._weights[name] += self._error(self._run(batch), reference)
        self.batches += 1

    def result(self) -> Sensitivity:
        """The report."""
        total = max(sum(self._macs.values()), 1)
        rows = []
        for name, layer in self.layers.items():
            quantizer = layer.input_quantizer
            assert quantizer is not None
            bits = quantizer.num_bits, layer.weight_quantizers[0].num_bits
            own, weights = self._own[name] / self.batches, self._weights[name] / self.batches
            rows.append(LayerSensitivity(layer.layer_name, _type(layer), *bits, own, weights, self._macs[name] / total))
        return Sensitivity(rows, self._whole / self.batches, "error" if self.loss is None else "loss")

    def _run(self, batch: Any) -> list[Tensor]:
        if self.loss is not None:
            return [torch.as_tensor(self.loss(self.network, batch), dtype=torch.float64)]
        output = parse_inputs(self.network, batch).copied().call(self.network)
        found = [x.detach().double() for x in tensors_in(output) if x.is_floating_point()]
        if not found:
            raise InvalidDataError("the model returns no floating tensor to compare; give a loss")
        return found

    def _error(self, seen: list[Tensor], reference: list[Tensor]) -> float:
        if self.loss is not None:
            return float(seen[0] - reference[0])
        if [x.shape for x in seen] != [x.shape for x in reference]:
            raise InvalidDataError("the shapes of the model's output depend on its values; give a loss")
        size = sum(float(x.square().sum()) for x in reference)
        return sum(float((x - y).square().sum()) for x, y in zip(seen, reference, strict=True)) / max(size, 1e-300)

    def _count(self, name: str, x: Tensor, output: Tensor) -> None:
        if self._counting:
            self._macs[name] += _multiplications(self.layers[name], x, output)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the multiplications of each layer in the forwards inside."""
        names = {layer: name for name, layer in self.layers.items()}

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            assert isinstance(layer, CompressedLayer)
            self._macs[names[layer]] += _multiplications(layer, args[0] if args else kwargs["input"], output)

        handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in names]
        self._counting = True
        try:
            yield
        finally:
            self._counting = False
            for handle in handles:
                handle.remove()


def _check_ready(layers: dict[str, CompressedLayer]) -> None:
    if not layers:
        raise ValueError("no layer of the model is quantised, so there is nothing to measure")
    uncalibrated = [name for name, layer in layers.items() if not layer.ready]
    if uncalibrated:
        raise StaleStateError(
            f"layer '{uncalibrated[0]}' ({len(uncalibrated)} in all) is not calibrated: train, or call "
            "amct_ext.calibrate, first"
        )


def _float_layers(layer: CompressedLayer, count: Callable[[Tensor, Tensor], None]) -> tuple[Forward, Forward]:
    """The forward of the float layer, and of the float layer with the quantised weight.

    Of a layer that is not called, the product in its place; the float one tells ``count`` of its input and result.
    """
    product = layer.refs.product
    if product is not None and product.parent:
        return _float_products(layer, count)
    plain, rounded = to_float(layer), to_float(layer)
    if product is not None:
        rounded = folded_layer(rounded, product)
    names: tuple[str, ...] = ("weight",)
    if isinstance(layer, CompressedRNN):
        names = ("weight_ih_l0", "weight_hh_l0")
        weights = [
            quantizer(getattr(layer, name)) for name, quantizer in zip(names, layer.weight_quantizers, strict=True)
        ]
        vars(rounded)["_flat_weights"] = list(vars(rounded)["_flat_weights"])
    else:
        weight = layer.compressed_weight()
        weights = [weight.t() if product is not None and product.weight_is_in_out else weight]
    rounded._parameters = dict(rounded._parameters)
    for name, weight in zip(names, weights, strict=True):
        setattr(rounded, name, nn.Parameter(weight.detach(), requires_grad=False))
    return plain.forward, rounded.forward


def _float_products(layer: CompressedLayer, count: Callable[[Tensor, Tensor], None]) -> tuple[Forward, Forward]:
    weight = layer.compressed_weight().detach()

    def plain(call: ProductCall) -> Tensor:
        y = call.compute(call.x, layer.weight)
        count(call.x, y)
        return y

    return plain, lambda call: call.compute(call.x, weight)


def _computes(layer: CompressedLayer) -> str:
    """The name of the method that computes a layer."""
    return "product" if layer.refs.product is not None and layer.refs.product.parent else "forward"


@contextmanager
def _forwards(layers: dict[str, CompressedLayer], forwards: dict[str, Forward]) -> Iterator[None]:
    """Other forwards for some layers."""
    try:
        for name, forward in forwards.items():
            vars(layers[name])[_computes(layers[name])] = forward
        yield
    finally:
        for name in forwards:
            vars(layers[name]).pop(_computes(layers[name]), None)


def _type(layer: CompressedLayer) -> str:
    kind = kind_of(layer)
    if kind is not None:
        return kind.name
    assert layer.refs.product is not None
    return layer.refs.product.kind


def _multiplications(layer: CompressedLayer, x: Tensor, output: Any) -> int:
    kind, product = kind_named(_type(layer)), layer.refs.product
    assert kind is not None
    if isinstance(layer, CompressedRNN):
        return x.numel() // max(x.shape[-1], 1) * (layer.weight_ih_l0.numel() + layer.weight_hh_l0.numel())
    of_input = kind.family is LayerFamily.TRANSPOSED_CONV  # which applies its kernel at each position of its input
    if product is not None and kind_of(layer) is None:
        return int(output.numel()) // max(layer.weight.shape[int(product.weight_is_in_out)], 1) * layer.weight.numel()
    width = int(getattr(layer, kind.widths[0 if of_input else 1]))
    return (x if of_input else output).numel() // max(width, 1) * layer.weight.numel()
