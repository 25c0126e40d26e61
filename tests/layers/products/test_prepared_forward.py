"""Evaluations on prepared floats: the values of the float path, whatever stands in the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models.single_layer import Chain, compressed
from torch import Tensor, nn

import amct_ext
from amct_ext.layers.products import prepared_conv, prepared_forward, prepared_weight
from amct_ext.layers.products.deferred_tensor import DeferredTensor


class Block(nn.Module):
    """An inverted residual block with a gate, as mobile networks have it."""

    def __init__(self, channels: int, kernel: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        wide = 3 * channels
        self.expand, self.norm1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.spatial = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.norm2, self.activation = nn.BatchNorm2d(wide), activation()
        self.squeeze, self.excite = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1)
        self.project, self.norm3 = nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels)
        self.padding = ((kernel - 1) // 2, kernel - 1 - (kernel - 1) // 2) * 2 if stride == 1 else (0, kernel - 1) * 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.expand(x)))
        y = self.activation(self.norm2(self.spatial(F.pad(y, self.padding))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.norm3(self.project(F.pad(y, (0, 0, 0, 0))))
        return y + x if self.stride == 1 else y


class Mobile(nn.Module):
    """What prepared convolutions meet: bounds, gates, zeros around, additions, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            Block(16, 3, 1, nn.ReLU6), Block(16, 3, 2, nn.Hardswish), Block(16, 5, 1, nn.SiLU), Block(16, 4, 1, nn.GELU)
        )
        self.grouped, self.shortcut = nn.Conv2d(16, 20, 3, padding=1, groups=2), nn.Conv2d(16, 20, 1)
        self.head = nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.max_pool2d(torch.relu(self.norm(self.stem(x))), 2))
        y = self.grouped(x)
        y += self.shortcut(x)
        return self.head(F.adaptive_avg_pool2d(F.relu_(y), 1).flatten(1))


def evaluated(net: nn.Module, folder: Path, shape: tuple[int, ...], way: str = "prepared") -> nn.Module:
    """Compressed, with the statistics of some training, in eval mode."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    model = compressed(net, torch.randn(shape), folder).train()
    for _ in range(3):
        model(torch.randn(shape))
    model.eval()
    with torch.no_grad():
        model(torch.randn(shape))  # searches shifts
    amct_ext.configure(model, forward=way)
    return model


def on_floats(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    amct_ext.configure(plain, forward="float")
    return plain


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed behind each convolution, in oneDNN's words."""
    made: list[str] = []
    real = prepared_conv.conv2d

    def watched(*args: object) -> Tensor:
        made.append(f"{args[6].name}{'' if args[5] is None else ' of a sum'}")
        return real(*args)

    monkeypatch.setattr(prepared_conv, "conv2d", watched)
    return made


def close(y: Tensor, expected: Tensor) -> None:
    """A code at a tie may be its neighbour, so most values agree closely and all of them within a few codes."""
    assert y.stride() == expected.stride() and type(y) is Tensor
    assert float((y - expected).abs().median()) < 2e-3 * float(expected.std())
    torch.testing.assert_close(y, expected, rtol=0, atol=0.15 * float(expected.std()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_model(layout: torch.memory_format, tmp_path: Path, products: list[str]) -> None:
    model = evaluated(Mobile(), tmp_path, (4, 3, 33, 30)).to(memory_format=layout)
    plain = on_floats(model)
    for count in (4, 1, 4):
        x = torch.randn(count, 3, 33, 30).to(memory_format=layout)
        products.clear()
        with torch.no_grad():
            close(model(x), plain(x))
        assert set(amct_ext.forward_choices(model).values()) == {"prepared"}
    assert len(products) == 1 + 4 * 5 + 2  # none is computed twice
    assert products[0] == "relu" and {"hardtanh", "hardswish", "swish", "none of a sum", "relu of a sum"} < {*products}
    with torch.inference_mode():
        model(x)
    with torch.no_grad():
        assert model(x[:0]).shape == (0, 6)
    assert set(amct_ext.forward_choices(model).values()) == {"float"}


class Two(nn.Module):
    """Two convolutions with a BatchNorm and a ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.norm(self.one(x))))


def test_codes_are_equal_where_there_is_no_tie(tmp_path: Path) -> None:
    model = evaluated(Two(), tmp_path, (2, 3, 20, 20))
    plain, x = on_floats(model), torch.randn(2, 3, 20, 20)
    seen: list[tuple[Tensor, Tensor]] = []
    for each in (model, plain):
        each.two.act_quant.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
        with torch.no_grad():
            each(x)
    (values, codes), (expected, expected_codes) = seen
    torch.testing.assert_close(values, expected, rtol=2e-6, atol=2e-6)
    steps = expected / model.two.act_quant.scale
    clear = (steps - steps.floor() - 0.5).abs() > 1e-4
    assert clear.sum() > 0.99 * clear.numel() and torch.equal(codes[clear], expected_codes[clear])


WRITES: dict[str, Callable[[Two], object]] = {
    "weight": lambda m: m.one.weight.data.mul_(-0.5),
    "bias": lambda m: m.one.bias.data.add_(1.0),
    "factor": lambda m: m.norm.weight.data.mul_(0.3),
    "mean": lambda m: m.norm.running_mean.data.add_(0.4),
    "variance": lambda m: m.norm.running_var.data.mul_(3.0),
    "step": lambda m: m.two.weight.mul_(2.0),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "without bias": lambda m: setattr(m.one, "bias", None),
}


@pytest.mark.parametrize("what", WRITES)
def test_packed_weights_follow_what_they_were_made_of(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[object] = []
    real = prepared_weight.pack_conv_weight
    monkeypatch.setattr(prepared_weight, "pack_conv_weight", lambda *a: packed.append(a) or real(*a))
    model, x = evaluated(Two(), tmp_path, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        before = model(x)
        assert len(packed) == 2 and torch.equal(model(x), before) and len(packed) == 2
        WRITES[what](model)
        changed, expected = model(x), on_floats(model)(x)
        assert len(packed) == 3 + (what == "step")  # a new version: shifts are searched anew, in results of the layer
        assert not torch.equal(changed, before)
    close(changed, expected)
    copied = pickle.loads(pickle.dumps(model))
    for each in (copied, copy.deepcopy(model)):
        assert each.one.product_choice.prepared._cached is None
        with torch.no_grad():
            assert torch.equal(each(x), changed)


def test_only_evaluations_without_gradients(tmp_path: Path, products: list[str]) -> None:
    model, x = evaluated(Two(), tmp_path, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    plain = on_floats(model)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    for each in (model, plain):
        each.train()
    assert torch.equal(model(x), plain(x))
    for each in (model, plain):
        each(x).sum().backward()
    assert torch.equal(model.one.weight.grad, plain.one.weight.grad)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.eval().double()(x.double()), plain.eval().double()(x.double()))
    assert not products and set(amct_ext.forward_choices(model).values()) == {"float"}


def test_compiled_graphs_multiply_floats(tmp_path: Path, products: list[str]) -> None:
    torch.compiler.reset()
    model, x = evaluated(Two(), tmp_path, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = on_floats(model)(x)
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not products


def test_hooks_see_values(tmp_path: Path) -> None:
    model, x = evaluated(Two(), tmp_path, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    plain = on_floats(model)
    kept: list[Tensor] = []
    seen: list[Tensor] = []
    for each in (model, plain):
        each.one.register_forward_hook(lambda m, args, y: kept.append(y))
        each.norm.register_forward_hook(lambda m, args, y: y * 2)
        each.two.register_forward_pre_hook(lambda m, args: seen.append(kept[-1] + 0))
    with torch.no_grad():
        y, expected = model(x), plain(x)
        assert not model.one.product_choice.prepared.policy.allowed  # the convolution was computed twice; never again
        close(y, expected)
        close(model(x), expected)
    for each in (0, 2):
        torch.testing.assert_close(seen[each] + 0, seen[1], rtol=2e-6, atol=2e-6)


def test_results_outside_of_a_forward_of_the_model_are_plain(tmp_path: Path) -> None:
    model, x = evaluated(Two(), tmp_path, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    seen: list[type] = []
    model.one.register_forward_hook(lambda m, args, y: seen.append(type(y)))
    with torch.no_grad():
        torch.testing.assert_close(model.one(x), on_floats(model).one(x), rtol=2e-6, atol=2e-6)
        model(x)
        with pytest.raises(RuntimeError):
            model.one(torch.randn(2, 4, 9, 9))
    assert seen[0] is Tensor and seen[-1] is DeferredTensor


@pytest.mark.parametrize("where", ["norm", "weight"])
def test_nan_is_noticed(where: str, tmp_path: Path) -> None:
    model, x = evaluated(Two(), tmp_path, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        getattr(model.norm if where == "norm" else model.one, "bias" if where == "weight" else "weight")[0] = torch.nan
        with pytest.raises(amct_ext.AmctError, match=r"two.*NaN or Inf"):
            model(x)


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8), (8,)])
def test_linear_layers(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = evaluated(Chain(nn.Linear(8, 5)), tmp_path, shape)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(model(x), on_floats(model)(x), rtol=2e-6, atol=2e-6)
    assert amct_ext.forward_choices(model) == {"layer": "prepared"}


def test_a_shared_input_is_quantised_once(tmp_path: Path) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.one(x) + self.two(x)

    model, x = evaluated(Fork(), tmp_path, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    (owner,) = (layer for layer in (model.one, model.two) if layer.act_quant is not None)
    made: list[object] = []
    real = owner.act_quant._fake_quantize
    owner.act_quant._fake_quantize = lambda v: made.append(v) or real(v)
    with torch.no_grad():
        y = model(x)
        assert len(made) == 1
        del owner.act_quant._fake_quantize
        close(y, on_floats(model)(x))


def test_where_there_is_no_onednn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_forward, "is_available", lambda: False)
    model, x = evaluated(Two(), tmp_path, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        assert torch.equal(model(x), on_floats(model)(x))
    assert set(amct_ext.forward_choices(model).values()) == {"float"}
    monkeypatch.undo()
