"""Loading a checkpoint: all of it or nothing, and one clear error whatever the file holds."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import rnn_job
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, train
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.checkpoint.load import load_checkpoint, read_state_dict

UNUSUAL = {
    "meta": lambda x: x.to("meta"),
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.flatten(1).to_sparse_csr(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Job, nn.Module]:
    job = Job(tmp_path, "batch_num: 2\n" + small.CONFIGS["mixed_quant"])
    model = job.create()
    train(model, optimizer_of(model), range(3))
    return job, model


def other_values(model: nn.Module) -> dict[str, Any]:
    """A state that fits but has other values everywhere."""
    return {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}


def refused(model: nn.Module, path: Path, error: type[Exception], *words: str) -> None:
    """Loading raises with these words, and state, attributes and results are what they were."""
    before = copy.deepcopy(model)
    output = evaluate(copy.deepcopy(model))
    tensors = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    with pytest.raises(error) as caught:
        load_checkpoint(model, str(path))
    for word in words:
        assert word in str(caught.value), caught.value
    assert_same_state(before, model)
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == tensors
    for ours, theirs in zip(before.modules(), model.modules(), strict=True):
        plain = {key: value for key, value in vars(ours).items() if isinstance(value, (int, float, str))}
        assert plain == {key: vars(theirs)[key] for key in plain}
    assert torch.equal(evaluate(model), output)


@pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested|torch.quantize_per_tensor|.*TypedStorage")
@pytest.mark.parametrize("kind", list(UNUSUAL))
@pytest.mark.parametrize("amct", [False, True], ids=["ours", "amct"])
def test_tensors_that_cannot_be_copied(trained: Any, tmp_path: Path, kind: str, amct: bool) -> None:
    job, model = trained
    state = amct_ext.to_amct_state_dict(model) if amct else other_values(model)
    key = next(key for key in state if key.endswith(("conv2.weight", "conv2.quant_module.replaced_module.weight")))
    torch.save({**state, key: UNUSUAL[kind](state[key])}, tmp_path / "state.pth")
    refused(model, tmp_path / "state.pth", RuntimeError, "state.pth", key)
    with pytest.raises(RuntimeError, match=r"state\.pth"):
        job.restore(tmp_path / "state.pth", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("conv2.act_quant.clip_max"), ("missing: conv2.act_quant.clip_max",)),
        (lambda state: state.update({"fc.bias": torch.zeros(6)}), ("shape: fc.bias",)),
        (lambda state: state.update({"fc.bias": torch.ones(5) * 1j}), ("dtype: fc.bias", "complex64")),
    ],
)  # fmt: skip
def test_what_does_not_fit(trained: Any, tmp_path: Path, change: Any, words: tuple[str, ...]) -> None:
    model = trained[1]
    state = other_values(model)
    change(state)
    torch.save(state, tmp_path / "state.pth")
    refused(model, tmp_path / "state.pth", RuntimeError, "state.pth", *words)


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no"), KeyboardInterrupt("no")])
def test_a_load_that_fails_half_way(trained: Any, tmp_path: Path, error: BaseException) -> None:
    """A module of the user's rejects what it gets, after everything before it was copied."""
    model = trained[1]

    def reject(*args: Any) -> None:
        raise error

    torch.save(other_values(model), tmp_path / "state.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = model.drop.register_load_state_dict_pre_hook(reject)
    with pytest.raises(type(error)):
        load_checkpoint(model, str(tmp_path / "state.pth"))
    handle.remove()
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[key].nan_to_num(7)), key


def told(load: Callable[[], object], name: str) -> bool:
    """Whether loading raised an error of ours with the file's name; any other error fails the test."""
    try:
        load()
        return False
    except amct_ext.AmctError as error:
        text = str(error)
    assert name in text
    return True


WRONG_SHAPES = {
    "acts_clip_max_pre": torch.ones(3), "acts_clip_min_pre": torch.ones(3), "cur_batch": torch.ones(3),
    "prune_cur_batch": torch.ones(2), "wts_scales": torch.ones(()), "rec_wts_scales": torch.ones(()),
    "acts_clip_max": torch.ones(2, dtype=torch.complex64), "acts_h_clip_max_pre": torch.ones(0),
}  # fmt: skip


@pytest.mark.parametrize("ending", list(WRONG_SHAPES))
@pytest.mark.parametrize("net", ["convolutions", "recurrent"])
def test_amct_entries_of_a_wrong_shape(tmp_path: Path, net: str, ending: str) -> None:
    """Nothing but CheckpointError comes of them, or they hold nothing that is loaded."""
    job: Any = (
        rnn_job.Job(tmp_path, "LSTM", "per_tensor")
        if net == "recurrent"
        else Job(tmp_path, small.CONFIGS["sparse_learned"])
    )
    model = job.create().train()
    model(job.sample if net == "recurrent" else small.SAMPLE)
    state = amct_ext.to_amct_state_dict(model)
    for gone in (False, True):
        changed = {key: WRONG_SHAPES[ending] if key.endswith("." + ending) else value for key, value in state.items()}
        if gone:
            changed = {key: value for key, value in state.items() if not key.endswith("." + ending)}
        torch.save(changed, tmp_path / "state.pth")
        before = copy.deepcopy(model)
        if told(lambda: load_checkpoint(model, str(tmp_path / "state.pth")), "state.pth"):
            assert_same_state(before, model)


def test_amct_state_must_hold_tensors(trained: Any) -> None:
    state: dict[str, Any] = {**amct_ext.to_amct_state_dict(trained[1]), "epoch": 3}
    with pytest.raises(TypeError, match="epoch"):
        amct_ext.from_amct_state_dict(trained[1], state)


class Remembers(nn.Module):
    """A module with state of its own that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = small.build(), {"epochs": 0}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def get_extra_state(self) -> dict[str, int]:
        return self.seen

    def set_extra_state(self, state: dict[str, int]) -> None:
        if state["epochs"] < 0:
            raise RuntimeError("negative")
        self.seen = state


def test_extra_state(tmp_path: Path) -> None:
    job = Job(tmp_path, small.QUANT)
    create = lambda: amct_ext.create_compressed_retrain_model(  # noqa: E731
        Remembers(), small.SAMPLE, str(job.config), str(job.record)
    )
    model = create()
    model.seen = {"epochs": 4}
    torch.save({"model": model.state_dict()}, tmp_path / "state.pth")
    assert job.restore(tmp_path / "state.pth", model=Remembers()).seen == {"epochs": 4}
    model.seen = {"epochs": -1}
    torch.save(model.state_dict(), tmp_path / "state.pth")
    other = create()
    before = {key: value for key, value in other.state_dict().items() if isinstance(value, Tensor)}
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(RuntimeError, match=r"state\.pth.*negative"):
        load_checkpoint(other, str(tmp_path / "state.pth"))
    assert other.seen == {"epochs": 0}
    assert all(torch.equal(other.state_dict()[key].nan_to_num(7), value.nan_to_num(7)) for key, value in before.items())


class Versioned(nn.Module):
    """A module that asks a state dict for its version, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.inner = small.build()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("keep", ["whole", "wrapped", "plain dict"])
def test_versions_of_modules(tmp_path: Path, keep: str) -> None:
    job = Job(tmp_path, small.QUANT)
    model = amct_ext.create_compressed_retrain_model(Versioned(), small.SAMPLE, str(job.config), str(job.record))
    state = nn.ModuleDict({"module": model}).state_dict() if keep == "wrapped" else model.state_dict()
    torch.save({"model": dict(state) if keep == "plain dict" else state}, tmp_path / "state.pth")
    assert_same_state(job.restore(tmp_path / "state.pth", model=Versioned()), model)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files(trained: Any, tmp_path: Path) -> None:
    """Whatever byte is wrong: read, or one error of ours with the file's name."""
    path = tmp_path / "damaged.pth"
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"model": trained[1].state_dict()}, buffer, _use_new_zipfile_serialization=zipped)
        raw = buffer.getvalue()
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            data = bytearray(raw)
            for index, value in torch.randint(0, 2048, (4, 2), generator=generator).tolist():
                data[index] = value % 256
            path.write_bytes(data)
            told(lambda: read_state_dict(str(path), "model"), "damaged.pth")


@pytest.mark.parametrize("entry", ["bias", "number"])
def test_an_entry_that_is_no_state_dict(tmp_path: Path, entry: str) -> None:
    torch.save({"bias": torch.ones(3), "number": 0}, tmp_path / "state.pth")
    with pytest.raises(RuntimeError, match=r"state\.pth"):
        read_state_dict(str(tmp_path / "state.pth"), entry)


@pytest.mark.parametrize("count", [float("nan"), float("-inf"), -3.0])
def test_a_count_of_batches_that_is_none(trained: Any, tmp_path: Path, count: float) -> None:
    """The clips are there; a training forward calibrates anew, as after any count that is not finished."""
    job, model = trained
    state = {k: torch.tensor(count) if k.endswith("batches_seen") else v for k, v in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "state.pth")
    restored = job.restore(tmp_path / "state.pth")
    torch.testing.assert_close(restored.eval()(small.SAMPLE), restored.eval()(small.SAMPLE))
    for _ in range(2):
        restored.train()(small.SAMPLE)
    restored.eval()(small.SAMPLE)
    assert "scale_d" in job.record.read_text()


class OnlyChild(nn.Module):
    """A model whose names all start as a wrapper's would."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = getattr(self, self.name)(x)
        return output


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_a_child_that_is_named_like_a_wrapper(tmp_path: Path, name: str, prefix: str) -> None:
    x, files = torch.randn(2, 3, 9, 9), (str(tmp_path / "compress.cfg"), str(tmp_path / "record.txt"))
    Path(files[0]).write_text(small.QUANT)
    model = amct_ext.create_compressed_retrain_model(OnlyChild(name), x, *files)
    model.train()(x)
    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, tmp_path / "model.pth")
    restored = amct_ext.restore_compressed_retrain_model(OnlyChild(name), x, *files, str(tmp_path / "model.pth"))
    assert_same_state(model, restored)
