"""What is done to a model before or after create: scripted parts, computed weights, adapters, odd names."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils as utils
from support import small_models as small
from support.any_job import AnyJob, off, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import amct_ext
from amct_ext.errors import ModelError

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
Change = Callable[[nn.Module], Any]


class Job:
    def __init__(self, folder: Path, config: str = small.QUANT) -> None:
        self.config, self.record, self.out = str(folder / "c.cfg"), str(folder / "r.txt"), str(folder / "net")
        (folder / "c.cfg").write_text(config)

    def create(self, net: nn.Module) -> Any:
        return amct_ext.create_compressed_retrain_model(net, X, self.config, self.record)

    def save(self, model: nn.Module) -> Tensor:
        """Save, and what the fake-quant file computes."""
        onnxruntime = pytest.importorskip("onnxruntime")
        amct_ext.save_compressed_retrain_model(model, self.record, self.out, X)
        session = onnxruntime.InferenceSession(f"{self.out}_fake_quant_model.onnx")
        return torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(X).pow(2).mean().backward()
        optimizer.step()


def close(seen: Tensor, want: Tensor) -> bool:
    return bool((seen - want).abs().max() < 0.02 * want.abs().max())


# -- weights that something computes

COMPUTED: dict[str, tuple[Change, str]] = {
    "parametrised": (parametrizations.spectral_norm, "weight"),
    "weight norm": (parametrizations.weight_norm, "weight"),
    "bias": (lambda layer: utils.parametrize.register_parametrization(layer, "bias", nn.Tanh()), "bias"),
    "old weight norm": (utils.weight_norm, "weight"),
    "old spectral norm": (utils.spectral_norm, "weight"),
    "torch's pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("config", ["quant", "sparse_learned"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_before_create(tmp_path: Path, kind: str, config: str) -> None:
    """The layer stays float with the reason; the caller's model can be copied though its weight has a history."""
    change, name = COMPUTED[kind]
    net = build()
    change(net[0])
    net(X)
    job = Job(tmp_path, small.CONFIGS[config])
    model = job.create(net)
    report = amct_ext.explain(model)
    assert f"its {name} is computed" in report["0"].not_quantised and report["2"].quantised
    train(model)
    want = model.eval()(X)
    assert close(job.save(model), want)
    net(X).sum().backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_after_create(tmp_path: Path, kind: str) -> None:
    """It trains and evaluates; save names the layer and what to do, and works after that."""
    change, name = COMPUTED[kind]
    job = Job(tmp_path)
    model = job.create(build())
    train(model)
    change(model[0])
    train(model)
    model.eval()(X)
    with pytest.raises(ModelError, match=rf"'0'.*{name} is computed \(parametrisation"):
        job.save(model)
    if kind == "parametrised":
        utils.parametrize.remove_parametrizations(model[0], "weight")
        train(model)
        want = model.eval()(X)
        assert close(job.save(model), want)


class Centred(nn.Linear):
    """The weight is a property."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.weight_raw = nn.Parameter(self._parameters.pop("weight").detach())

    @property
    def weight(self) -> Tensor:
        return self.weight_raw - self.weight_raw.mean(1, keepdim=True)


class Doubled(nn.Linear):
    """The bias is a property."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.raw = nn.Parameter(self._parameters.pop("bias").detach())

    @property
    def bias(self) -> Tensor:
        return 2 * self.raw


@pytest.mark.parametrize("layer", [Centred, Doubled])
@pytest.mark.parametrize("config", ["quant", "sparse", "filter"])
def test_properties(tmp_path: Path, config: str, layer: Any) -> None:
    net = nn.Sequential(layer(8, 8), nn.ReLU(), *build())
    job = Job(tmp_path, small.CONFIGS[config])
    model = job.create(net)
    assert "is computed (property" in str(amct_ext.explain(model)["0"])
    train(model)
    want = model.eval()(X)
    assert close(job.save(model), want)


# -- scripted parts


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)).relu()


SCRIPTED: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(Part()),
    "traced": lambda: torch.jit.trace(Part().eval(), X),
    "without parameters": lambda: torch.jit.script(nn.ReLU()),
    "nested": lambda: nn.Sequential(nn.Linear(8, 8), torch.jit.script(Part())),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("config", ["quant", "filter_quant"])
@pytest.mark.parametrize("kind", SCRIPTED)
def test_scripted_parts_stay_float(tmp_path: Path, kind: str, config: str) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 8), SCRIPTED[kind](), nn.Linear(8, 8), nn.Linear(8, 4))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    job = Job(tmp_path, small.CONFIGS[config])
    model = job.create(net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    train(model)  # the copy's parameters are leaves
    want = model.eval()(X)
    assert close(job.save(model), want)
    torch.save(model.state_dict(), tmp_path / "s.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, X, job.config, job.record, str(tmp_path / "s.pth"))
    assert torch.equal(restored.eval()(X), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_script_function_and_a_scripted_model(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 4), torch.jit.script(rectified)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x)))

    job = Job(tmp_path)
    model = job.create(Net())
    train(model)
    want = model.eval()(X)
    assert close(job.save(model), want)
    with pytest.raises(ModelError, match="TorchScript"):
        job.create(torch.jit.script(build()))


def rectified(x: Tensor) -> Tensor:
    return torch.relu(x)


# -- adapters and exchanged layers


class Adapter(nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)


class Lora(Adapter):
    merged = False


def put(place: int, make: Callable[[Any], nn.Module]) -> Change:
    def change(model: Any) -> None:
        model[place] = make(model[place])

    return change


@pytest.mark.parametrize(("flow", "place"), [("compressed", 0), ("compressed", 2), ("quant", 0)])
@pytest.mark.parametrize("make", [Adapter, lambda old: nn.Linear(8, old.out_features)])
def test_wrapped_or_exchanged(tmp_path: Path, make: Any, place: int, flow: str, caplog: Any) -> None:
    """Evaluation and save work; the record keeps the names of create."""
    job = Job(tmp_path)
    if flow == "quant":
        amct_ext.create_quant_retrain_config(f"{job.config}.json", build(), X)
        model: Any = amct_ext.create_quant_retrain_model(f"{job.config}.json", build(), job.record, X)
    else:
        model = job.create(build())
    put(place, make)(model)
    train(model)
    want = model.eval()(X)
    wrapped = make is Adapter
    assert (f'key: "{place}"' in Path(job.record).read_text()) is wrapped
    with caplog.at_level(logging.WARNING):
        if flow == "quant":
            amct_ext.save_quant_retrain_model(f"{job.config}.json", model, job.record, job.out, X)
        else:
            assert close(job.save(model), want)
    assert (f"layer '{place}', compressed at create, is no longer" in caplog.text) is not wrapped
    assert bool(amct_ext.explain(model)[str(place)].quantised) is wrapped
    amct_ext.to_amct_state_dict(model)


def test_wrapped_in_front_of_its_batch_norm(tmp_path: Path) -> None:
    class Wrap(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    x = torch.randn(4, 4, 6, 6)
    job = Job(tmp_path)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = amct_ext.create_compressed_retrain_model(net, x, job.config, job.record)
    model[0] = Wrap(model[0])
    model.train()(x)
    model.eval()(x)
    state = amct_ext.to_amct_state_dict(model)
    assert "0.inner.bn_module.running_var" in state
    amct_ext.save_compressed_retrain_model(model, job.record, job.out, x)


def test_an_adapter_that_is_not_merged_and_a_copied_layer(tmp_path: Path) -> None:
    job = Job(tmp_path)
    model = job.create(build())
    put(0, Lora)(model)
    train(model)
    model.eval()(X)
    with pytest.raises(ModelError, match=r"'0' is inside an adapter \(Lora\)"):
        job.save(model)
    model = job.create(build())
    model.append(nn.Linear(4, 8)).append(copy.deepcopy(model[0]))
    train(model)
    model.eval()(X)
    with pytest.raises(ModelError, match=r"'4' is a copy of the compressed layer '0'"):
        job.save(model)


def test_lora_of_peft(tmp_path: Path) -> None:
    """Adapters change nothing before they are trained; merged, they are part of what is quantised and saved."""
    peft = pytest.importorskip("peft")
    job = Job(tmp_path)
    model = job.create(build())
    train(model)
    want = model.eval()(X).detach()
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    assert torch.equal(model.eval()(X), want)
    train(model)
    model.eval()(X)
    with pytest.raises(ModelError, match="merge"):
        job.save(model)
    model[0].merge()
    model.train()(X)
    want = model.eval()(X)
    assert close(job.save(model), want)
    model[0] = model[0].get_base_layer()
    assert close(job.save(model), want)


def test_a_model_around_the_compressed_one_is_named(tmp_path: Path) -> None:
    class Forwards(nn.Module):
        """Hands attributes on, as peft's wrappers do."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    with pytest.raises(ModelError, match="its submodule 'inner' was"):
        amct_ext.explain(Forwards(Job(tmp_path).create(build())))


# -- names and values


ODD = ("a b", 'a"b', "a'b", "a\nb", "a\\b", "a/b", "class", "a\0b", "日本", "{a}", "%s")


@pytest.mark.parametrize("config", ["quant", "sparse"])
def test_odd_names(tmp_path: Path, config: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box = nn.ModuleDict({name: nn.Linear(8, 8) for name in ODD})
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.stack([layer(x) for layer in self.box.values()]).sum(0))

    job = Job(tmp_path, small.CONFIGS[config])
    model = job.create(Net())
    assert all(not amct_ext.explain(model)[f"box.{name}"].left_alone for name in ODD)
    train(model)
    want = model.eval()(X)
    assert close(job.save(model), want)
    torch.save(model.state_dict(), tmp_path / "s.pth")
    restored = amct_ext.restore_compressed_retrain_model(Net(), X, job.config, job.record, str(tmp_path / "s.pth"))
    assert torch.equal(restored.eval()(X), want)


def test_a_layer_called_like_a_setting(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("batch_num", nn.Linear(8, 8))
    with pytest.raises(ValueError, match="batch_num"):
        amct_ext.create_quant_retrain_config(str(tmp_path / "c.json"), net, X)


def test_meta_tensors_are_refused_by_name(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for module, name in ((nn.Linear(8, 8, device="meta"), "1.weight"), (nn.BatchNorm1d(8, device="meta"), "1.weight")):
        with pytest.raises(ModelError, match=f"'{name}' is on the meta device"):
            job.create(nn.Sequential(nn.Linear(8, 8), module))


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs() + 0.1


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("config", ["filter", "filter_quant"])
def test_a_computed_batch_norm_keeps_its_channels(tmp_path: Path, parameter: str, config: str) -> None:
    """Its channels cannot be cut out of what computes them; other layers are pruned."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    utils.parametrize.register_parametrization(net[1], parameter, Positive())
    job = AnyJob(tmp_path, small.CONFIGS[config])
    x = torch.randn(2, 3, 6, 6)
    model = job.calibrated(net, x)
    report = amct_ext.explain(model)
    assert f"its {parameter} is computed" in report["0"].not_pruned
    assert model[3].out_channels < 8
    seen = model.eval()(x)
    assert off(run(job.save(model, x)[0], x), seen) < 0.02
