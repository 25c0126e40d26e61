"""Options for weights: scales of least squared error, LSQ's gradient, SR-STE, scales that keep their channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, resume, train, train_and_save
from support.models import small
from torch import nn
from torch.utils.checkpoint import checkpoint

import amct_ext
from amct_ext import ops
from amct_ext.layers.compressed import CompressedLayer

DATA = "retrain_data_quant_config { ulq_quantize { } }\n"
SR_STE = "prune_config { n_out_of_m_pruner { l1_selective_prune { update_freq: 2 mask_gradient: SR_STE %s } } }\n"


def weight(algo: str, fields: str = "scale_start: LEAST_SQUARES") -> str:
    return DATA + f"retrain_weight_quant_config {{ {algo} {{ {fields} }} }}\n"


CONFIGS = {
    "adaptive, 4 bits": weight("arq_retrain", "dst_type: INT4 scale_start: LEAST_SQUARES"),
    "learned, 4 bits": weight("ulq_retrain", "dst_type: INT4 scale_start: LEAST_SQUARES scale_gradient: LSQ"),
    "learned": weight("ulq_retrain"),
    "sparse": SR_STE % "",
    "sparse, adaptive": SR_STE % "decay: 0.01" + small.QUANT,
    "sparse, adaptive, 4 bits": SR_STE % "" + weight("arq_retrain", "dst_type: INT4 scale_start: LEAST_SQUARES"),
    "sparse, learned": SR_STE % "" + weight("ulq_retrain"),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def layers(model: nn.Module) -> list[CompressedLayer]:
    return [m for m in model.modules() if isinstance(m, CompressedLayer)]


@pytest.fixture
def job(tmp_path: Path, name: str) -> Job:
    return Job(tmp_path, CONFIGS[name])


@every_config
def test_restore_is_exact(job: Job, tmp_path: Path) -> None:
    whole = job.create()
    train(whole, optimizer_of(whole), range(4))
    first = train_and_save(job, tmp_path / "half.pth", range(2))
    second, optimizer = resume(job, tmp_path / "half.pth")
    assert_same_state(first, second)
    expected, record = evaluate(first), job.record.read_text()
    assert torch.equal(evaluate(job.restore(tmp_path / "half.pth")), expected)
    assert job.record.read_text() == record
    train(second, optimizer, range(2, 4))
    assert_same_state(whole, second)
    assert torch.equal(evaluate(whole), evaluate(second))


@every_config
def test_the_keys_of_the_state_are_those_without_the_aid(job: Job, name: str, tmp_path: Path) -> None:
    plain = CONFIGS[name]
    for field in ("scale_start: LEAST_SQUARES", "scale_gradient: LSQ", "mask_gradient: SR_STE", "decay: 0.01"):
        plain = plain.replace(field, "")
    job.config.write_text(plain)
    keys = list(job.create().state_dict())
    job.config.write_text(CONFIGS[name])
    assert list(job.create().state_dict()) == keys


@pytest.mark.parametrize("name", ["adaptive, 4 bits", "sparse, adaptive, 4 bits"])
def test_every_forward_takes_the_scale_of_least_squared_error(job: Job) -> None:
    model = job.create()
    train(model, optimizer_of(model), range(3))
    evaluate(model)
    searched = [layer for layer in layers(model) if layer.weight_quant.least_squares]
    assert searched
    for layer in searched:
        quantizer = layer.weight_quant
        mask = None if layer.sparsity is None else layer.sparsity.mask
        want = ops.search_weight_scale(layer.weight.detach(), 4, quantizer.channel_axis, mask)
        assert torch.equal(quantizer.scale, want)
        assert torch.equal(quantizer.current_scale(layer.masked_weight()), want)
        seen = layer.compressed_weight().detach()
        assert torch.equal(seen, ops.lsq_fake_quantize(layer.masked_weight(), want, 4, quantizer.channel_axis))


@pytest.mark.parametrize("name", ["learned", "learned, 4 bits"])
def test_learned_scales_start_at_the_least_squared_error(job: Job) -> None:
    model = job.create()
    starts = [ops.search_weight_scale(q.weight.detach(), q.weight_quant.num_bits, q.weight_quant.channel_axis)
              for q in layers(model)]  # fmt: skip
    for layer, start in zip(layers(model), starts, strict=True):
        assert torch.equal(layer.weight_quant.current_scale(layer.weight), start)
    model.eval()(small.batch(0)[0])
    model.train()(small.batch(0)[0])
    for layer, start in zip(layers(model), starts, strict=True):
        assert torch.equal(layer.weight_quant.scale, start)


def test_the_gradient_of_lsq_counts_all_weights_of_a_scale(tmp_path: Path) -> None:
    grads = {}
    for kind in ("AMCT", "LSQ"):
        job = Job(tmp_path, weight("ulq_retrain", f"channel_wise: false scale_gradient: {kind}"))
        model = job.create().train()
        torch.manual_seed(0)  # dropout
        nn.functional.cross_entropy(model(small.batch(0)[0]), small.batch(0)[1]).backward()
        grads[kind] = [layer.weight_quant.scale.grad for layer in layers(model)]
    for amct, lsq, layer in zip(grads["AMCT"], grads["LSQ"], layers(model), strict=True):
        torch.testing.assert_close(lsq, amct / len(layer.weight) ** 0.5)


def test_masked_weights_learn(tmp_path: Path) -> None:
    for text in (SR_STE % "decay: 0.5", SR_STE % "decay: 0.5" + small.QUANT, SR_STE % "decay: 0.5" + small.LEARNED):
        model = Job(tmp_path, text).create().train()
        model(small.batch(0)[0]).square().sum().backward()
        for layer in layers(model):
            dropped = ~layer.sparsity.mask
            assert layer.weight.grad[dropped].any() or not dropped.any()
    assert "SR-STE with decay=0.5" in repr(model)


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_the_saved_file_and_the_integer_forward_have_the_scale(algo: str, tmp_path: Path) -> None:
    job = Job(tmp_path, weight(algo, "dst_type: INT4 scale_start: LEAST_SQUARES"))
    model = job.create()
    train(model, optimizer_of(model), range(2))
    expected = evaluate(model)
    amct_ext.configure(model, forward="integer")
    torch.testing.assert_close(evaluate(model), expected, rtol=1e-4, atol=1e-4)
    pytest.importorskip("onnxruntime", reason="saved files are run: pip install -e .[dev]")
    from support.checks.onnx_run import run_onnx

    amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "net"), small.SAMPLE)
    x = small.batch(50)[0][: len(small.SAMPLE)]
    seen = run_onnx(tmp_path / "net_fake_quant_model.onnx", x)
    torch.testing.assert_close(seen, expected[: len(x)], rtol=1e-3, atol=1e-2)


class TestScalesKeepTheirChannels:
    """One step has moved scales far below what the weights need, or far above."""

    @staticmethod
    def lost(tmp_path: Path, text: str = small.LEARNED) -> tuple[Job, nn.Module, list[torch.Tensor]]:
        job = Job(tmp_path, text)
        model = job.create()
        train(model, optimizer_of(model), range(2))
        right = []
        with torch.no_grad():
            for layer in layers(model):
                scale = layer.weight_quant.scale
                scale[0], scale[-1] = -0.01, 1e3
                weight, want, axis = layer.masked_weight(), scale.detach().clone(), layer.weight_quant.channel_axis
                ops.repair_weight_scale_(weight, want, 8, axis)
                by_range = ops.arq_fake_quantize(weight, 8, axis)[1]
                assert torch.equal(want[[0, -1]], by_range[[0, -1]])
                right.append(want)
        return job, model, right

    @staticmethod
    def same(model: nn.Module, right: list[torch.Tensor]) -> bool:
        return all(torch.equal(layer.weight_quant.scale, r) for layer, r in zip(layers(model), right, strict=True))

    @pytest.mark.parametrize("text", [small.LEARNED, small.SPARSE % 0 + small.LEARNED])
    def test_a_training_forward_sets_them_back(self, tmp_path: Path, text: str) -> None:
        _, model, right = self.lost(tmp_path, text)
        model.train()(small.batch(2)[0]).sum().backward()
        assert self.same(model, right)

    def test_evaluation_record_and_state_agree_with_it(self, tmp_path: Path) -> None:
        job, model, right = self.lost(tmp_path)
        recorded = [layer.weight_quant.current_scale(layer.masked_weight()) for layer in layers(model)]
        assert all(torch.equal(a, b) for a, b in zip(recorded, right, strict=True))
        state = model.state_dict()
        assert self.same(model, right)
        torch.save({"model": state}, tmp_path / "state.pth")
        _, other, _ = self.lost(tmp_path)
        y = evaluate(other)
        assert self.same(other, right)
        assert torch.equal(evaluate(job.restore(tmp_path / "state.pth")), y)

    def test_what_was_loaded_leaves_as_it_came(self, tmp_path: Path) -> None:
        _, model, _ = self.lost(tmp_path)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        key = next(key for key in state if key.endswith("weight_quant.scale"))
        state[key][0] = -0.5
        model.load_state_dict(state)
        assert model.state_dict()[key][0] == -0.5
        model(small.batch(2)[0])
        assert model.state_dict()[key][0] > 0

    def test_gradient_checkpointing_and_integers_see_the_same(self, tmp_path: Path) -> None:
        _, model, right = self.lost(tmp_path)
        x = small.batch(2)[0].requires_grad_()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        checkpoint(model.train(), x, use_reentrant=False).sum().backward()
        assert self.same(model, right)
        _, model, _ = self.lost(tmp_path)
        floats = evaluate(model)
        _, model, _ = self.lost(tmp_path)
        amct_ext.configure(model, forward="integer")
        torch.testing.assert_close(evaluate(model), floats, rtol=1e-4, atol=1e-4)

    def test_compiled(self, tmp_path: Path) -> None:
        torch.compiler.reset()
        _, model, right = self.lost(tmp_path)
        compiled = torch.compile(model.train(), backend="aot_eager")
        compiled(small.batch(2)[0]).sum().backward()
        assert self.same(model, right)

    def test_a_scale_in_order_keeps_its_bits(self, tmp_path: Path) -> None:
        model = Job(tmp_path, small.LEARNED).create()
        train(model, optimizer_of(model), range(2))
        with torch.no_grad():
            for layer in layers(model):
                layer.weight_quant.scale.copy_(0.7 * layer.weight_quant._scale_of(layer.weight))
        before = [layer.weight_quant.scale.detach().clone() for layer in layers(model)]
        model.train()(small.batch(2)[0])
        evaluate(model)
        model.state_dict()
        assert self.same(model, before)
