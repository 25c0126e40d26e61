"""The quantisation flow: golden created states, exact restore, record file, save and its checks."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import onnx
import pytest
import torch
from support.checks.onnx_run import run_onnx
from support.checks.rejection import rejected
from support.golden.run import Case
from support.jobs.retrain_job import assert_same_state, evaluate, optimizer_of, train
from support.models import small
from torch import nn

import amct_ext
from amct_ext.record.text import parse_record, read_record

# Cases whose configuration only quantises; the two with batch_num 2 and INT16 are among them on purpose.
GOLDEN = [
    "cnn_quant", "cnn_quant_bn2", "cnn_a16w8", "cnn_arq_cwfalse", "cnn_clip_fixedmin", "cnn_fp16_mode",
    "cnn_override_types", "cnn_ulqw", "cnn_w4_ulqw", "concat_quant", "conv1d_quant", "conv3d_quant", "deconv_quant",
    "encoder_quant", "group_quant", "mlp_quant", "mlp_ulqw_w4", "mobile_quant", "res_quant", "reused_quant",
    "shared_override", "shared_quant",
]  # fmt: skip


class Job:
    """One job of the quantisation flow in a folder of its own."""

    def __init__(self, folder: Path, text: str = small.QUANT) -> None:
        self.folder = folder
        (folder / "job.cfg").write_text(text)
        self.config, self.record = str(folder / "quant.json"), str(folder / "record.txt")
        amct_ext.create_quant_retrain_config(self.config, small.build(), small.SAMPLE, str(folder / "job.cfg"))

    def create(self, model: nn.Module | None = None) -> nn.Module:
        return amct_ext.create_quant_retrain_model(self.config, model or small.build(), self.record, small.SAMPLE)

    def restore(self, checkpoint: Path, name: str | None = None, model: nn.Module | None = None) -> nn.Module:
        return amct_ext.restore_quant_retrain_model(
            self.config, model or small.build(), self.record, small.SAMPLE, str(checkpoint), name
        )

    def save(self, model: nn.Module, config: str | None = None) -> None:
        amct_ext.save_quant_retrain_model(
            config or self.config, model, self.record, str(self.folder / "out" / "net"), small.SAMPLE
        )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_signatures() -> None:
    expected = {
        amct_ext.create_quant_retrain_config: "config_file model input_data config_defination",
        amct_ext.create_quant_retrain_model: "config_file model record_file input_data",
        amct_ext.restore_quant_retrain_model: "config_file model record_file input_data pth_file state_dict_name",
        amct_ext.save_quant_retrain_model: "config_file model record_file save_path input_data input_names "
        "output_names dynamic_axes",
    }
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters) == names.split()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_created_state(golden: Path, tmp_path: Path, name: str) -> None:
    case = Case(golden, name, tmp_path)
    config, sample = str(tmp_path / "quant.json"), case.data["sample_x"]
    amct_ext.create_quant_retrain_config(config, case.float_model(), sample, case.config)
    model = amct_ext.create_quant_retrain_model(config, case.float_model(), case.record, sample)
    ours, theirs = amct_ext.to_amct_state_dict(model), case.load.created_state(name)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].shape == value.shape and ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key].nan_to_num(7), value.nan_to_num(7)), key
    assert Path(case.record).read_text() == case.load.record(name, "after_create")


def test_golden_checkpoint_restores(golden: Path, tmp_path: Path) -> None:
    """The reference's checkpoint evaluates, restored through JSON, as it did before it was saved."""
    case = Case(golden, "cnn_quant", tmp_path)
    config, sample = str(tmp_path / "quant.json"), case.data["sample_x"]
    amct_ext.create_quant_retrain_config(config, case.float_model(), sample, case.config)
    model = amct_ext.restore_quant_retrain_model(
        config, case.float_model(), case.record, sample, str(golden / "cnn_quant" / "checkpoint.pth"), "state_dict"
    )
    out = case.evaluate(model)
    torch.testing.assert_close(out, case.golden_results["eval_out"], atol=1e-4, rtol=1e-4)
    ours, theirs = read_record(case.record), parse_record(case.load.record("cnn_quant", "after_eval"))
    assert [entry.key for entry in ours.quant] == [entry.key for entry in theirs.quant]
    for a, b in zip(ours.quant, theirs.quant, strict=True):
        assert (a.offset_d, a.act_type, a.wts_type) == (b.offset_d, b.act_type, b.wts_type)
        torch.testing.assert_close(torch.tensor([a.scale_d, *a.scale_w]), torch.tensor([b.scale_d, *b.scale_w]))


def test_create_empties_the_record_and_leaves_the_model_alone(job: Job) -> None:
    Path(job.record).write_text("old\n")
    model = small.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    created = job.create(model)
    assert Path(job.record).read_text() == ""
    assert_same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert assert_same and type(model.conv1) is nn.Conv2d and created is not model
    assert Path(job.record + ".bak").read_text() == "old\n"
    train(created, optimizer_of(created), range(1))
    evaluate(created)
    assert len(read_record(job.record).quant) == 5


def test_a_failed_create_leaves_the_record(job: Job) -> None:
    Path(job.record).write_text("precious\n")
    Path(job.config).write_text("{}")
    with rejected(job.folder, ValueError, "quant.json", "version"):
        job.create()


def test_equals_the_compressed_flow_and_restores_exactly(job: Job) -> None:
    model = job.create()
    other = amct_ext.create_compressed_retrain_model(
        small.build(), small.SAMPLE, str(job.folder / "job.cfg"), str(job.folder / "other.txt")
    )
    for each in (model, other):
        train(each, optimizer_of(each), range(3))
    assert_same_state(model, other)
    torch.save({"net": model.state_dict()}, job.folder / "state.pth")
    expected = evaluate(other)
    evaluate(model)
    record = Path(job.record).read_text()
    restored = job.restore(job.folder / "state.pth", "net")
    assert Path(job.record).read_text() == record  # neither read nor changed
    Path(job.record).unlink()
    assert torch.equal(evaluate(restored), expected)
    assert Path(job.record).read_text() == record


def test_distributed_wrapper_stays(job: Job, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel
        amct_ext.create_quant_retrain_config(job.config, ddp(small.build()), small.SAMPLE)
        model = job.create(ddp(small.build()))
        assert isinstance(model, ddp)
        train(model, optimizer_of(model), range(1))
        torch.save(model.state_dict(), tmp_path / "state.pth")
        restored = job.restore(tmp_path / "state.pth", model=ddp(small.build()))
        assert isinstance(restored, ddp)
        assert_same_state(model, restored)
        evaluate(restored)
        job.save(restored)
    finally:
        torch.distributed.destroy_process_group()


def test_save(job: Job) -> None:
    model = job.create()
    train(model, optimizer_of(model), range(2))
    expected = evaluate(model)
    model.train()
    job.save(model)
    assert model.training
    out = run_onnx(job.folder / "out" / "net_fake_quant_model.onnx", small.batch(50)[0])
    # A value on a rounding tie may fall to the other side, which moves single outputs by about a quantisation step.
    assert ((out - expected).abs() > 2e-5).float().mean() <= 0.1 and (out - expected).abs().max() < 0.02
    kinds = [node.op_type for node in onnx.load(job.folder / "out" / "net_deploy_model.onnx").graph.node]
    assert kinds.count("AscendDequant") == 5


def test_save_refuses_another_configuration(job: Job) -> None:
    model = job.create()
    train(model, optimizer_of(model), range(1))
    evaluate(model)
    content = json.loads(Path(job.config).read_text())
    content["batch_num"] = 3
    content["conv1"]["retrain_enable"] = False
    content["fc"]["retrain_data_config"]["dst_type"] = "INT16"
    other = job.folder / "other.json"
    other.write_text(json.dumps(content))
    with rejected(job.folder, RuntimeError, "other.json", "batch_num", "conv1", "'fc': data.num_bits is 16"):
        job.save(model, str(other))
    (job.folder / "reordered.json").write_text(
        json.dumps(dict(reversed(json.loads(Path(job.config).read_text()).items())))
    )
    job.save(model, str(job.folder / "reordered.json"))


def test_save_checks(job: Job) -> None:
    model = job.create()
    train(model, optimizer_of(model), range(2))
    with rejected(job.folder, RuntimeError, "eval mode"):
        job.save(model)  # nothing recorded
    evaluate(model)
    train(model, optimizer_of(model), range(2, 3))
    with rejected(job.folder, RuntimeError, "stem"):
        job.save(model)  # trained on since
    with rejected(job.folder, RuntimeError, "create_*"):
        job.save(small.build())
    with rejected(job.folder, ValueError, "config_file"):
        job.save(model, str(job.folder) + "/")
    with rejected(job.folder, TypeError, "input_names"):
        amct_ext.save_quant_retrain_model(job.config, model, job.record, "net", small.SAMPLE, "x")


def test_models_of_other_flows_are_sent_there(job: Job) -> None:
    (job.folder / "both.cfg").write_text(small.CONFIGS["filter_quant"])
    both = amct_ext.create_compressed_retrain_model(
        small.build(), small.SAMPLE, str(job.folder / "both.cfg"), job.record
    )
    with rejected(job.folder, RuntimeError, "save_compressed_retrain_model"):
        job.save(both)
    (job.folder / "prune.cfg").write_text(small.FILTER)
    pruned = amct_ext.create_prune_retrain_model(small.build(), small.SAMPLE, str(job.folder / "prune.cfg"), job.record)
    with rejected(job.folder, RuntimeError, "save_prune_retrain_model"):
        job.save(pruned)
    with rejected(job.folder, RuntimeError, "compressed already"):
        job.create(both)
    with rejected(job.folder, RuntimeError, "compressed already"):
        amct_ext.create_quant_retrain_config(job.config, both, small.SAMPLE)


def test_argument_types(job: Job) -> None:
    with rejected(job.folder, TypeError, "config_file"):
        amct_ext.create_quant_retrain_config(Path(job.config), small.build(), small.SAMPLE)
    with rejected(job.folder, TypeError, "record_file"):
        amct_ext.create_quant_retrain_model(job.config, small.build(), None, small.SAMPLE)
    with rejected(job.folder, TypeError, "pth_file"):
        amct_ext.restore_quant_retrain_model(job.config, small.build(), job.record, small.SAMPLE, None)
    with rejected(job.folder, FileNotFoundError, "absent.json"):
        amct_ext.create_quant_retrain_model(str(job.folder / "absent.json"), small.build(), job.record, small.SAMPLE)
    with rejected(job.folder, RuntimeError, "input_data"):
        amct_ext.create_quant_retrain_config(job.config, small.build(), [1, 2])
