"""Layers of a user's class that keeps the forward of its parent: the compressed layer is of that class, too."""

from __future__ import annotations

import abc
import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small
from support.models.single_layer import SAMPLES
from torch import Tensor, nn

import amct_ext
from amct_ext.flows.saving import to_float_form


class Members:
    """What users add to a layer."""

    factor = 2.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.note = 3
        self.register_buffer("calls", torch.tensor(2.0))

    def penalty(self) -> Tensor:
        return next(self.parameters()).abs().mean()

    @property
    def share(self) -> float:
        return 0.5

    def get_extra_state(self) -> dict[str, int]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.note = state["note"]

    def __getattr__(self, name: str) -> Any:
        return 42 if name == "made_up" else super().__getattr__(name)

    def extra_repr(self) -> str:
        return super().extra_repr() + ", mine"


# In the module, where pickle looks for them.
for _name, _sample in SAMPLES.items():
    globals()[f"My{_name}"] = type(f"My{_name}", (Members, _sample.cls), {"__module__": __name__})


class Net(nn.Module):
    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(width, width), layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.before(x))
        y = y[0] if isinstance(y, tuple) else y
        if not isinstance(self.layer, Members):
            return y.tanh()
        return y / self.layer.factor * self.layer.share * self.layer.made_up


class Job:
    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config, self.record = folder, str(folder / "c.cfg"), str(folder / "r.txt")
        (folder / "c.cfg").write_text(config)

    def create(self, net: nn.Module, x: Tensor) -> nn.Module:
        return amct_ext.create_compressed_retrain_model(net, x, self.config, self.record)

    def restore(self, net: nn.Module, x: Tensor, state: Any) -> nn.Module:
        torch.save(state, self.folder / "s.pth")
        return amct_ext.restore_compressed_retrain_model(net, x, self.config, self.record, str(self.folder / "s.pth"))


@pytest.mark.parametrize("kind", SAMPLES)
def test_members_copies_and_state(tmp_path: Path, kind: str) -> None:
    sample = SAMPLES[kind]
    user = globals()[f"My{kind}"]
    x = torch.randn(sample.shape)
    net, job = Net(user(*sample.arguments), sample.shape[-1]), Job(tmp_path, sample.settings + small.QUANT)
    model = job.create(net, x)
    model.train()(x)
    want = model.eval()(x)
    layer = model.layer
    assert isinstance(layer, user) and isinstance(layer, sample.cls) and type(layer) is not user
    assert "act_quant.clip_max" in layer.state_dict()
    assert layer.penalty() > 0 and "mine" in repr(model) and user.__name__ in repr(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert type(other.layer) is type(layer)
        assert torch.equal(other(x), want)
        other.train()(x).sum().backward()
    layer.note = 9
    for state in (model.state_dict(), amct_ext.to_amct_state_dict(model)):
        restored = job.restore(net, x, state)
        assert torch.equal(restored.eval()(x), want)
        assert restored.layer.note == 9
    plain = to_float_form(model, x).model.layer
    assert type(plain) is user and plain.note == 9 and plain.made_up == 42
    assert not any(name in vars(plain) for name in ("refs", "layer_name", "sparsity"))


def test_compiled(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    model = Job(tmp_path, small.QUANT).create(Net(globals()["MyLinear"](8, 8), 8), x)
    model.train()(x)
    want = model.eval()(x)
    assert torch.equal(torch.compile(model, backend="eager")(x), want)


class _Meta(type):
    pass


class WithMeta(nn.Linear, metaclass=_Meta):
    pass


class Registered(nn.Linear):
    known: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls, *, key: str, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        Registered.known.append(key)


class Keyed(Registered, key="keyed"):
    pass


class Slotted(nn.Linear):
    __slots__ = ("__hidden", "note")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.note, self.__hidden = "n", 5

    def hidden(self) -> int:
        return self.__hidden

    def __getstate__(self) -> Any:
        return {**self.__dict__, "kept": (self.note, self.__hidden)}

    def __setstate__(self, state: Any) -> None:
        self.note, self.__hidden = state.pop("kept")
        super().__setstate__(state)


class NewNeedsArguments(nn.Linear):
    def __new__(cls, inputs: int, outputs: int) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> Any:
        return self.in_features, self.out_features


class _Abstract(abc.ABC):
    @abc.abstractmethod
    def value(self) -> int: ...


class Concrete(_Abstract, nn.Linear):
    def value(self) -> int:
        return 1


@pytest.mark.parametrize("config", ["quant", "sparse"])
@pytest.mark.parametrize("user", [WithMeta, Keyed, Slotted, NewNeedsArguments, Concrete])
def test_classes_made_in_other_ways(tmp_path: Path, user: Any, config: str) -> None:
    x = torch.randn(4, 8)
    model = Job(tmp_path, small.CONFIGS[config]).create(nn.Sequential(user(8, 8), nn.ReLU(), nn.Linear(8, 4)), x)
    model.train()(x)
    want = model.eval()(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[0], user) and torch.equal(other(x), want)
        if user is Slotted:
            assert other[0].note == "n" and other[0].hidden() == 5
    assert type(to_float_form(model, x).model[0]) is user
    assert Registered.known == ["keyed"]


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        twin = type(self)(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin


class _NoMore(type):
    def __new__(mcs, name: str, *args: Any) -> Any:
        if name != "Last":
            raise TypeError("no further classes")
        return super().__new__(mcs, name, *args)


class Last(nn.Linear, metaclass=_NoMore):
    pass


class Flagged(nn.Linear):
    ready = True


def with_attribute(*args: int) -> nn.Module:
    layer = nn.Linear(*args)
    layer.sparsity = 0.5
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [(OwnCopy, "__deepcopy__"), (Last, "no further classes"), (Flagged, "'ready'"), (with_attribute, "sparsity")],
)
@pytest.mark.parametrize("config", ["quant", "sparse"])
def test_what_cannot_be_derived_is_left_float_with_the_reason(
    tmp_path: Path, make: Any, words: str, config: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(4, 8)
    net = nn.Sequential(make(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = Job(tmp_path, small.CONFIGS[config]).create(net, x)
    assert type(model[0]) is type(net[0])
    report = amct_ext.explain(model)["0"]
    assert words in (report.not_quantised if config == "quant" else report.not_pruned)
    assert "layer '0'" in caplog.text
    model.train()(x)
    model.eval()(x)


class Named(nn.Conv2d):
    pass


@pytest.mark.parametrize("flow", ["compressed", "sparse", "quant"])
@pytest.mark.parametrize("ours", [False, True])
def test_amcts_files_say_which_subclasses_are_compressed(tmp_path: Path, flow: str, ours: bool) -> None:
    """AMCT left the subclass float: so does a restore from its files, the next one from ours, and the saved files."""
    config = small.CONFIGS["sparse_quant" if flow == "sparse" else "quant"]
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    theirs = copy.deepcopy(plain)
    theirs[2] = Named(8, 8, 1)
    theirs.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 6, 6)
    job = Job(tmp_path, config + 'quant_skip_layers: "2"\n' + 'regular_prune_skip_layers: "2"\n' * (flow == "sparse"))
    model = job.create(plain, x)
    model.train()(x)
    want = model.eval()(x)
    state = model.state_dict() if ours else amct_ext.to_amct_state_dict(model)
    (tmp_path / "c.cfg").write_text(config)  # nothing in it names the layer
    if flow != "quant":
        restored = job.restore(theirs, x, state)
    else:
        json, record, file = str(tmp_path / "c.json"), str(tmp_path / "q.txt"), str(tmp_path / "q.pth")
        amct_ext.create_quant_retrain_config(json, theirs, x, job.config)
        torch.save(state, file)
        restored = amct_ext.restore_quant_retrain_model(json, theirs, record, x, file)
    assert torch.equal(restored.eval()(x), want)
    assert type(restored[2]) is Named
    assert "checkpoint" in amct_ext.explain(restored)["2"].not_quantised
    if flow == "quant":
        amct_ext.save_quant_retrain_model(json, restored, record, str(tmp_path / "net"), x)
    else:
        amct_ext.save_compressed_retrain_model(restored, job.record, str(tmp_path / "net"), x)


def test_a_class_with_a_forward_of_its_own_is_named(tmp_path: Path) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(super().forward(input))

    model = Job(tmp_path, small.QUANT).create(nn.Sequential(Twice(8, 8), nn.Linear(8, 4)), torch.randn(4, 8))
    assert "class Twice multiplies by its weight in 2 places" in amct_ext.explain(model)["0"].not_quantised


def test_a_quantised_subclass_stays_quantised(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6, 6)
    net, job = nn.Sequential(Named(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), Job(tmp_path, small.QUANT)
    model = job.create(net, x)
    model.train()(x)
    want = model.eval()(x)
    for state in (model.state_dict(), amct_ext.to_amct_state_dict(model)):
        restored = job.restore(net, x, state)
        assert torch.equal(restored.eval()(x), want) and type(restored[0]) is type(model[0])
