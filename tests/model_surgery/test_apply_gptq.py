"""`compensate_rounding`: what a calibration does to INT4 weights, and what it leaves alone."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, resume, train, train_and_save
from support.models import small
from support.processes.ranks import two_ranks
from torch import nn

import amct_ext
from amct_ext.layers.compressed import CompressedLayer

DATA = "retrain_data_quant_config { ulq_quantize { } }\n"


def weight(algo: str = "ulq_retrain", fields: str = "compensate_rounding: true", batches: int = 1) -> str:
    fields = f"dst_type: INT4 scale_start: LEAST_SQUARES {fields}"
    return f"batch_num: {batches}\n{DATA}retrain_weight_quant_config {{ {algo} {{ {fields} }} }}\n"


CONFIGS = {
    "adaptive": weight("arq_retrain"),
    "learned": weight(),
    "three batches": weight(batches=3),
    "best": f"profile: BEST batch_num: 3 {DATA} retrain_weight_quant_config {{ ulq_retrain {{ dst_type: INT4 }} }}",
}
every_config = pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
batches = [small.batch(i)[0] for i in range(3)]


def layers(model: nn.Module) -> dict[str, CompressedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedLayer)}


def compensated(model: nn.Module) -> dict[str, CompressedLayer]:
    return {name: layer for name, layer in layers(model).items() if getattr(layer, "gptq", None) is not None}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in layers(model).items()}


def output_errors(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each layer's product with the quantised weight against that with the float one, on the data calibrated on."""
    errors = dict.fromkeys(before, 0.0)

    def hook(name: str):
        def measure(layer: CompressedLayer, args: tuple[torch.Tensor]) -> None:
            float_y = layer.compute_with_weight(args[0], before[name])
            y = layer.compute_with_weight(args[0], layer.compressed_weight())
            errors[name] += float((y - float_y).square().mean())

        return measure

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers(model).items()]
    with torch.no_grad():
        for x in batches[: layers(model)["fc"].act_quant.batch_num]:
            model.eval()(x)
    for handle in hooks:
        handle.remove()
    return errors


@every_config
def test_the_error_of_every_output_falls(text: str, tmp_path: Path) -> None:
    errors = []
    for config in (
        text,
        text.replace("compensate_rounding: true", "").replace("INT4 }", "INT4 compensate_rounding: false }"),
    ):
        model = Job(tmp_path, config).create()
        before = weights(model)
        amct_ext.calibrate(model, batches)
        errors.append(output_errors(model, before))
        changed = {name for name, old in before.items() if not torch.equal(old, layers(model)[name].weight)}
        assert changed == set(compensated(model))
    names = set(errors[0]) - {"stem"}  # three input channels: INT8
    assert {"conv1", "conv2", "down", "fc"} == names
    for name in names:
        assert errors[0][name] < errors[1][name], name
    assert sum(errors[0][name] for name in names) < 0.8 * sum(errors[1][name] for name in names)


def test_adaptive_rows_that_changed_are_codes_of_the_scale_that_the_next_forward_finds(tmp_path: Path) -> None:
    model = Job(tmp_path, weight("arq_retrain")).create().eval()
    before = weights(model)
    amct_ext.calibrate(model, batches)
    rows = 0
    for name, layer in compensated(model).items():
        now, rounded = layer.weight.detach().flatten(1), layer.compressed_weight().detach().flatten(1)
        changed = (now != before[name].flatten(1)).any(1)
        rows += int(changed.sum())
        torch.testing.assert_close(rounded[changed], now[changed], rtol=1e-3, atol=1e-6)
    assert rows


@every_config
def test_restore_is_exact_and_changes_nothing_again(text: str, tmp_path: Path) -> None:
    job = Job(tmp_path, text)
    whole = job.create()
    train(whole, optimizer_of(whole), range(6))
    first = train_and_save(job, tmp_path / "half.pth", range(4))
    second, optimizer = resume(job, tmp_path / "half.pth")
    assert all(layer.gptq.done for layer in compensated(second).values())
    assert_same_state(first, second)
    assert torch.equal(evaluate(first), evaluate(job.restore(tmp_path / "half.pth")))
    train(second, optimizer, range(4, 6))
    assert_same_state(whole, second)
    job.config.write_text(weight(fields=""))
    assert set(job.create().state_dict()) >= {key for key in second.state_dict() if "weight_quant" not in key}


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_batch_changes_the_weights_once(count: int, tmp_path: Path) -> None:
    model = Job(tmp_path, weight(batches=count)).create().train()
    start = weights(model)
    names = set(compensated(model))
    for i, x in enumerate((*batches, *batches)):
        before = weights(model)
        model(x).sum().backward()
        changed = {name for name, old in before.items() if not torch.equal(old, layers(model)[name].weight)}
        assert changed == (names if i == count - 1 else set())
    assert all(layer.gptq.hessian is None for layer in compensated(model).values())
    assert all(torch.isfinite(layer.weight.grad).all() for layer in layers(model).values())
    assert not any(torch.equal(start[name], layers(model)[name].weight) for name in names)


def test_the_start_of_a_learned_scale_is_that_of_the_weight_as_it_was(tmp_path: Path) -> None:
    plain = Job(tmp_path, weight(fields="")).create()
    model = Job(tmp_path, weight()).create()
    for each in (plain, model):
        amct_ext.calibrate(each, batches)
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight_quant.scale, layers(plain)[name].weight_quant.scale)


def test_evaluations_and_forwards_under_vmap_gather_nothing(tmp_path: Path) -> None:
    model = Job(tmp_path, weight(batches=3)).create()
    before = weights(model)
    evaluate(model)
    assert all(layer.gptq.hessian is None for layer in compensated(model).values())
    assert all(torch.equal(old, layers(model)[name].weight) for name, old in before.items())


def test_a_copy_and_a_load_in_the_middle(tmp_path: Path) -> None:
    job = Job(tmp_path, weight(batches=3))
    model = job.create().train()
    with torch.no_grad():
        model(batches[0])
        other = copy.deepcopy(model)
        for x in batches[1:]:
            for each in (model, other):
                torch.manual_seed(0)  # dropout
                each(x)
        assert_same_state(model, other)
        fresh = job.create().train()
        fresh(batches[2])
        fresh.load_state_dict(fresh.state_dict())  # the calibration starts over
        assert all(layer.gptq.hessian is None for layer in compensated(fresh).values())


@pytest.mark.parametrize(
    "text",
    [
        small.QUANT,
        weight(fields=""),
        weight(fields="compensate_rounding: false").replace("batch_num", "profile: BEST batch_num"),
        weight().replace("INT4", "INT8"),
        weight().replace("ulq_quantize { }", "ulq_quantize { clip_max_min { clip_max: 3 clip_min: -3 } }"),
        small.SPARSE % 0 + weight(),
    ],
)
def test_left_alone(text: str, tmp_path: Path) -> None:
    model = Job(tmp_path, text).create()
    assert not [name for name in compensated(model) if layers(model)[name].sparsity is not None]
    if "prune" not in text:
        before = weights(model)
        amct_ext.calibrate(model, batches)
        assert all(torch.equal(old, layers(model)[name].weight) for name, old in before.items())


def test_a_weight_that_another_module_has_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Job(tmp_path, weight()).create()
    model.head = nn.Linear(16, 5)
    model.head.weight = model.fc.weight
    before = weights(model)
    with caplog.at_level(logging.WARNING):
        amct_ext.calibrate(model, batches)
    assert torch.equal(before["fc"], model.fc.weight) and not torch.equal(before["conv1"], model.conv1.weight)
    assert caplog.text.count("compensate_rounding: 1 layer(s) keep their weights: 'fc' (another module") == 1


def test_a_compiled_calibration_leaves_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.compiler.reset()
    model = Job(tmp_path, weight()).create().train()
    before = weights(model)
    compiled = torch.compile(model, backend="aot_eager")
    with caplog.at_level(logging.WARNING):
        compiled(batches[0]).sum().backward()
        model.state_dict()
        model.state_dict()
    assert all(torch.equal(old, layers(model)[name].weight) for name, old in before.items())
    assert caplog.text.count("calibrated in a compiled graph") == 1


@every_config
def test_saved_files_and_the_integer_forward_agree(text: str, tmp_path: Path) -> None:
    job = Job(tmp_path, text)
    model = job.create()
    assert (model.fc.weight_quant.scale.numel() > 1) == ("BEST" in text)
    amct_ext.calibrate(model, batches)
    expected = evaluate(model)
    again = job.create()
    amct_ext.configure(again, forward="integer")
    amct_ext.calibrate(again, batches)
    torch.testing.assert_close(evaluate(again), expected, rtol=1e-3, atol=1e-3)
    pytest.importorskip("onnxruntime", reason="saved files are run: pip install -e .[dev]")
    import numpy as np
    from support.checks.onnx_run import run_onnx
    from support.models.export_models import tensors

    amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "net"), small.SAMPLE)
    x = small.batch(50)[0][: len(small.SAMPLE)]
    torch.testing.assert_close(run_onnx(tmp_path / "net_fake_quant_model.onnx", x), expected, rtol=1e-3, atol=1e-2)
    deploy, fake = (tensors(tmp_path / f"net_{kind}_model.onnx") for kind in ("deploy", "fake_quant"))
    assert deploy["fc.weight"].dtype == np.int8 and deploy["fc.weight"].shape[0] * 2 == fake["fc.weight"].shape[0]
    factors = deploy["fc.dequant.param"].astype(np.uint32).view(np.float32)
    np.testing.assert_allclose(factors, model.fc.deq_scale().numpy(), rtol=1e-6)


def test_the_json_configuration_keeps_what_the_profile_chose(tmp_path: Path) -> None:
    config, written = tmp_path / "best.cfg", tmp_path / "quant.json"
    config.write_text(CONFIGS["best"])
    amct_ext.create_quant_retrain_config(str(written), small.build(), small.SAMPLE, str(config))
    assert '"compensate_rounding":true' in written.read_text()
    model = amct_ext.create_quant_retrain_model(str(written), small.build(), str(tmp_path / "r.txt"), small.SAMPLE)
    assert set(compensated(model)) == {"conv1", "conv2", "down", "fc"}
    assert model.fc.weight_quant.scale.numel() == 5 and model.stem.weight_quant.num_bits == 8


def _on_a_rank(rank: int, folder: Path) -> None:
    from support.processes.ranks import own_folder

    model = Job(own_folder(rank, folder), weight(batches=2)).create().train()
    with torch.no_grad():
        for i in range(2):
            model(small.batch(2 * i + rank)[0])
    torch.save({name: layer.weight.detach() for name, layer in layers(model).items()}, folder / f"{rank}.pt")


@pytest.mark.slow
def test_ranks_have_the_same_weights(tmp_path: Path) -> None:
    with two_ranks() as ranks:
        ranks.run(_on_a_rank, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start = weights(Job(tmp_path, weight()).create())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [name for name in one if torch.equal(one[name], start[name])] == ["stem"]


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_errors_of_the_field(algo: str, tmp_path: Path) -> None:
    from amct_ext.errors import ConfigError

    with pytest.raises(ConfigError, match=r"compress\.cfg.*compensate_rounding"):
        Job(tmp_path, weight(algo, "compensate_rounding: 3.5")).create()
