"""Every golden case of the compressed flow: create, record, losses, parameters, evaluation, restore.

``quirks.json`` of the golden data says which numbers do not bind (a bug of AMCT, or a trajectory that one ulp
of noise sends elsewhere); there the test runs the stage and checks that it is sound, or asserts our documented
deviation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from support.checks.agreement import CLOSE, compare
from support.golden.deviations import (
    ACCEPTED,
    COUNTERS,
    NEGATIVE_SCALES,
    NOT_RESTORABLE,
    PRUNED_FURTHER,
    RECURRENT,
    REJECTED,
    binds,
    channel_counts,
    other_channels,
)
from support.golden.run import Case, case_names
from support.processes.devices import DEVICES
from torch import Tensor

import amct_ext
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.record_factors import check_record
from amct_ext.record.text import parse_record

RUNNABLE = [name for name in case_names() if name not in (*REJECTED, ACCEPTED)]


@pytest.fixture(scope="module", params=DEVICES)
def runs(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Case]]:
    device = torch.device(request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the golden data were made
    yield {name: Case(golden, name, tmp_path_factory.mktemp(name), device) for name in case_names()}
    torch.set_num_threads(threads)


@pytest.fixture
def case(request: pytest.FixtureRequest, runs: dict[str, Case]) -> Case:
    run = runs[request.param]
    run.notes = request.node.user_properties
    return run


def every(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names, indirect=True)


@every(list(REJECTED))
def test_rejected(case: Case) -> None:
    with pytest.raises(ValueError):
        _ = case.created
    assert not Path(case.record).exists()


@every([ACCEPTED])
def test_global_channel_wise_leaves_linear_per_tensor(case: Case) -> None:
    case.deviates("a Linear takes one scale instead of failing")
    layers = dict(compressed_layers(case.created))
    assert layers["fc"].weight_quant.channel_axis is None
    assert all(layers[name].weight_quant.channel_axis == 0 for name in ("conv1", "conv2", "conv3"))


@every(RUNNABLE)
def test_created(case: Case) -> None:
    """Which layers are compressed, and what is shared."""
    if "module_types" not in case.facts:
        case.deviates("AMCT raises at create")
        assert list(compressed_layers(case.created)) == []
        return
    types = case.facts["module_types"]
    wrapped = {
        n
        for n, t in types.items()
        if t in ("RetrainQuant", "RNNRetrainQuant") or (t.startswith("CompModule") and "quant_module" not in n)
    }
    layers = dict(compressed_layers(case.created))
    assert set(layers) == wrapped
    for sharer, owner in case.facts["reuse"].items():
        a, b = (layers[name.removesuffix(".quant_module")] for name in (sharer, owner))
        assert a.input_quantizer is b.input_quantizer
    assert sum(layer.refs.shared_act_quant is not None for layer in layers.values()) == len(case.facts["reuse"])


@every(RUNNABLE)
def test_created_state(case: Case) -> None:
    _ = case.created
    if not case.stored("created_state.pt"):
        return
    ours, theirs = case.created_state, case.load.created_state(case.name)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        if case.name in PRUNED_FURTHER:
            case.deviates("pruned further")
            continue
        assert ours[key].shape == value.shape, key
        if key.endswith("wts_mask") and not ours[key].isnan().any():
            case.deviates("the mask exists from create on, not from the first forward")
            assert value.isnan().all() and set(ours[key].unique().tolist()) <= {0.0, 1.0}
        elif not other_channels(case):
            assert torch.equal(ours[key].nan_to_num(7), value.nan_to_num(7)), key


@every(RUNNABLE)
def test_record_after_create(case: Case) -> None:
    _ = case.created
    if not case.stored("record_after_create.txt"):
        return
    ours, theirs = parse_record(case.record_after_create), parse_record(case.load.record(case.name, "after_create"))
    assert ours.quant == theirs.quant == ()
    if ours.sparse:
        case.deviates("2:4 entries hold the mask from create on")
    assert [(s.name, s.mask_shape) for s in ours.sparse] == [(s.name, s.mask_shape) for s in theirs.sparse]
    assert all(s.mask is not None for s in ours.sparse)
    if case.name in PRUNED_FURTHER:
        case.deviates("pruned further")
        assert len(ours.channel) > len(theirs.channel)
        chosen = {(n.name, n.prune_index) for c in ours.channel for n in c.producers}
        assert {(n.name, n.prune_index) for c in theirs.channel for n in c.producers} <= chosen
    elif other_channels(case):
        case.deviates("coupled producers decide together")
        assert channel_counts(ours) == channel_counts(theirs)
    else:
        assert ours.channel == theirs.channel


@every(RUNNABLE)
def test_losses(case: Case) -> None:
    _ = case.trained
    assert all(map(_finite, case.losses))
    if binds(case, "L"):
        torch.testing.assert_close(
            torch.tensor(case.losses), torch.tensor(case.golden_results["losses"]), rtol=2e-4, atol=1e-5
        )


@every(list(RECURRENT))
def test_first_loss_of_recurrent_layers(case: Case) -> None:
    """The first step is AMCT's, whose gradients of weights are missing."""
    _ = case.trained
    case.deviates("recurrent weights are trained")
    assert case.losses[0] == pytest.approx(case.golden_results["losses"][0], rel=1e-6)
    theirs = case.golden_results["first_step_grads"]
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert case.first_grads[f"rnn.{name}"].abs().max() > 0
        assert theirs[f"rnn.quant_module.comp_module.{name}"] is None
    for name in ("bias_ih_l0", "bias_hh_l0"):
        expected = theirs[f"rnn.quant_module.comp_module.{name}"]
        torch.testing.assert_close(case.first_grads[f"rnn.{name}"], expected, rtol=1e-5, atol=1e-8)
    for ours, name in (("act_quant.", "acts_"), ("hidden_quant.", "acts_h_")):
        for clip in ("clip_max", "clip_min"):
            expected = theirs[f"rnn.quant_module.{name}{clip}"]
            torch.testing.assert_close(case.first_grads[f"rnn.{ours}{clip}"], expected, rtol=1e-4, atol=1e-9)


@every(RUNNABLE)
def test_parameters_over_the_steps(case: Case) -> None:
    _ = case.trained
    if not binds(case, "P"):
        return
    for key, stacked in case.golden_results["per_step"].items():
        if key.rpartition(".")[2] in COUNTERS:
            continue
        ours = torch.stack([state[key] for state in case.per_step])
        torch.testing.assert_close(
            ours, stacked, rtol=2e-3, atol=2e-4, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


@every(list(NEGATIVE_SCALES))
def test_learned_scales_stay_positive(case: Case) -> None:
    case.deviates("learned scales stay positive")
    _ = case.trained
    steps = case.golden_results["per_step"]
    theirs = {k: v.amin(1) for k, v in steps.items() if k.endswith("wts_scales") and not v.isnan().any()}
    lowest = torch.stack(list(theirs.values())).amin(0)
    sound = int((lowest > 0).long().cumprod(0).sum()) + 1  # the step after the last positive scales still agrees
    assert 1 < sound < len(case.losses)
    expected = torch.tensor(case.golden_results["losses"][:sound])
    torch.testing.assert_close(torch.tensor(case.losses[:sound]), expected, rtol=2e-4, atol=1e-5)
    for _, layer in compressed_layers(case.trained):
        if layer.weight_quant is None:
            continue
        assert (layer.weight_quant.current_scale(layer.weight) > 0).all()


@every(RUNNABLE)
def test_masks_after_training(case: Case) -> None:
    _ = case.trained
    if not binds(case, "M"):
        return
    theirs = {s.name: s.mask for s in parse_record(case.load.record(case.name, "after_train")).sparse}
    state = case.per_step[-1]
    for name, layer in compressed_layers(case.trained):
        if layer.sparsity is not None and theirs.get(name) is not None:
            words = torch.tensor(theirs[name], dtype=torch.int64)
            key = name + (".quant_module" if layer.weight_quant is not None else "") + ".wts_mask"
            assert torch.equal(state[key].bool(), amct_ext.ops.unpack_mask(words, list(layer.weight.shape))), name


@every(RUNNABLE)
def test_eval(case: Case) -> None:
    assert _finite(case.eval_out)
    if binds(case, "E"):
        torch.testing.assert_close(case.eval_out, case.golden_results["eval_out"], rtol=1e-3, atol=2e-4)


@every(RUNNABLE)
def test_record_after_eval(case: Case) -> None:
    _ = case.eval_out
    ours = parse_record(case.record_after_eval)
    check_record(case.trained, ours, "record")
    # All channel records survive, in a mixed model too.
    assert ours.channel == parse_record(case.record_after_create).channel
    if not binds(case, "Q"):
        return
    theirs = parse_record(case.load.record(case.name, "after_eval"))
    assert [q.key for q in ours.quant] == [q.key for q in theirs.quant]
    for a, b in zip(ours.quant, theirs.quant, strict=True):
        assert (a.act_type, a.wts_type, a.offset_w) == (b.act_type, b.wts_type, b.offset_w)
        assert abs(a.offset_d - b.offset_d) <= 1, a.key
        torch.testing.assert_close(
            torch.tensor((a.scale_d, *a.scale_w)), torch.tensor((b.scale_d, *b.scale_w)), rtol=2e-3, atol=0
        )


@every([name for name in RUNNABLE if name not in NOT_RESTORABLE])
def test_restore_from_amcts_files(case: Case) -> None:
    """AMCT's files restore here, and the learned clips stay (deviation: AMCT searches them anew)."""
    model = case.amct_restored
    ours, theirs = case.state(model), case.load.trained_state(case.name)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        if key.rpartition(".")[2] in COUNTERS:
            assert bool(ours[key] > 0) == bool(value > 0), key
        elif ".replaced_module.bias_" in key:
            case.deviates("the trained biases of a recurrent layer, which AMCT drops, stand in both places")
            assert torch.equal(ours[key], theirs[key.replace("replaced_module", "comp_module")]), key
        elif key.rpartition(".")[2] not in ("scale_w", "scale_r"):  # AMCT fills it at its first evaluation
            assert torch.equal(ours[key].nan_to_num(7), value.nan_to_num(7)), key
    out = case.evaluate(model)
    if binds(case, "Y"):
        if not torch.equal(case.golden_results["restored_eval_out"], case.golden_results["eval_out"]):
            case.deviates("the learned clips stay, where AMCT searches them anew")
        torch.testing.assert_close(out, case.golden_results["eval_out"], rtol=1e-3, atol=2e-4)


# The file of a recurrent layer keeps its states in float: test_rnn_files.
@every([name for name in RUNNABLE if name not in (*RECURRENT, "lstm_ulqw")])
def test_saved_file_agrees_with_evaluation(case: Case) -> None:
    """The fake-quant file in onnxruntime against torch, layer by layer; values on rounding ties are told apart."""
    _ = case.eval_out
    prefix = str(case.folder / "saved")
    amct_ext.save_compressed_retrain_model(case.trained, case.record, prefix, case.data["sample_x"])
    (data,) = case.data["eval_x"]
    model = copy.deepcopy(case.trained).cpu().eval()
    if case.name == "cnn_fp16_mode":  # the file's scales go through half precision, as asked for; torch's do not
        case.deviates("FORCE_FP16_QUANT has its effect")
        return
    found = compare(model, Path(case.record), Path(prefix + "_fake_quant_model.onnx"), data.cpu())
    assert found.error <= CLOSE, found
    assert found.ties <= 0.01 * found.values, found


@every(RUNNABLE)
def test_own_round_trip(case: Case) -> None:
    expected = case.eval_out
    record = case.folder / "record_after_train.txt"
    record.write_text(case.record_after_train)
    assert torch.equal(case.evaluate(case.restore(str(record), case.checkpoint)), expected)
    # ... and through AMCT's names
    dialect = case.folder / "dialect.pth"
    torch.save(case.per_step[-1], dialect)
    assert torch.equal(case.evaluate(case.restore(str(record), str(dialect), None)), expected)


def _finite(value: Tensor | float | Mapping[str, Tensor]) -> bool:
    return bool(torch.isfinite(torch.as_tensor(value)).all())
