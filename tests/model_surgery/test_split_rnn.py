"""Recurrent layers of several layers or directions: split with `profile: BEST`, whole otherwise."""

from pathlib import Path

import pytest
import torch
from support.checks.onnx_run import run_onnx
from torch import nn

import amct_ext
from amct_ext.layers.recurrent.rnn import CompressedRNN
from amct_ext.layers.recurrent.rnn_stack import RecurrentStack
from amct_ext.model_surgery.lookup import compressed_layers

QUANT = "retrain_data_quant_config { ulq_quantize { } }\nretrain_weight_quant_config { arq_retrain { } }\n"
BEST = "profile: BEST\n" + QUANT
OPTIONS = (
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False, "dropout": 0.3},
)
PARTS = ["rnn.l0", "rnn.l0_reverse", "rnn.l1", "rnn.l1_reverse"]
kinds = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])


class Net(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(6, 8, **({"num_layers": 2, "bidirectional": True} | options))
        self.fc = nn.Linear(8 * (1 + self.rnn.bidirectional), 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


class Job:
    def __init__(self, folder: Path, net: nn.Module, text: str):
        self.net, self.config, self.record, self.state = net, folder / "c.cfg", folder / "r.txt", folder / "s.pth"
        self.config.write_text(text)
        torch.manual_seed(1)
        self.x = torch.randn(5, 4, 6)

    def create(self):
        return amct_ext.create_compressed_retrain_model(self.net.eval(), self.x, str(self.config), str(self.record))

    def train(self, model):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(self.x).square().mean().backward()
            optimizer.step()
        return model

    def restore(self, model):
        torch.save(model.state_dict(), self.state)
        args = self.x, str(self.config), str(self.record), str(self.state)
        return amct_ext.restore_compressed_retrain_model(self.net.eval(), *args)


def recurrent(model):
    return [name for name, layer in compressed_layers(model) if isinstance(layer, CompressedRNN)]


@kinds
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stack_computes_what_the_float_layer_does(kind, options):
    torch.manual_seed(0)
    rnn = kind(6, 8, **options).eval()
    x = torch.randn(5, 4, 6)
    batch = x.shape[0 if rnn.batch_first else 1]
    state = torch.randn(rnn.num_layers * (1 + rnn.bidirectional), batch, 8)
    given = (None, (state, state * 2) if kind is nn.LSTM else state)
    expected = [rnn(x, hx) for hx in given]
    parameters = {id(parameter) for parameter in rnn.parameters()}
    stack = RecurrentStack.of(rnn)
    assert {id(parameter) for parameter in stack.parameters()} == parameters
    for hx, (output, last) in zip(given, expected, strict=True):
        torch.testing.assert_close(stack(x, hx)[0], output, rtol=0, atol=1e-6)
        torch.testing.assert_close(stack(x, hx)[1], last, rtol=0, atol=1e-6)


def test_a_stack_takes_over_hooks_mode_and_settings():
    rnn, seen = nn.GRU(6, 8, 2, dropout=0.5), []
    rnn.register_forward_hook(lambda *_: seen.append(1))
    stack = RecurrentStack.of(rnn)
    stack.flatten_parameters()
    stack(torch.randn(5, 4, 6))
    assert seen == [1] and stack.hidden_size == 8 and stack.training
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6)
    assert not torch.equal(stack(x)[0], stack(x)[0])  # dropout between the layers
    assert torch.equal(stack.eval()(x)[0], stack(x)[0])


def test_the_default_leaves_them_float_as_amct_does(tmp_path, caplog):
    model = Job(tmp_path, Net(), QUANT).create()
    assert recurrent(model) == [] and type(model.rnn) is nn.LSTM


@kinds
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "dropout": 0.2}], ids=str)
def test_create_train_restore_and_save(tmp_path, kind, options):
    torch.manual_seed(0)
    job = Job(tmp_path, Net(kind, **options), BEST)
    before = {key: value.clone() for key, value in job.net.state_dict().items()}
    model = job.create()
    assert recurrent(model) == PARTS and type(job.net.rnn) is kind
    assert all(torch.equal(before[key], value) for key, value in job.net.state_dict().items())
    with torch.no_grad():
        right = job.net(job.x)
        model.train()(job.x)
        assert (model.eval()(job.x) - right).norm() < 0.03 * right.norm()
    job.train(model)
    restored = job.restore(model)
    assert torch.equal(restored.eval()(job.x), model.eval()(job.x))
    prefix = tmp_path / "out" / "net"
    amct_ext.save_compressed_retrain_model(model, str(job.record), str(prefix), job.x)
    seen = run_onnx(f"{prefix}_fake_quant_model.onnx", job.x)
    expected = model(job.x).detach()
    # The file's LSTM rounds its input and first state, not the states between.
    assert (seen - expected).norm() < 0.03 * expected.norm()


def test_skipping_and_overriding_the_whole_layer_counts_for_its_parts(tmp_path):
    for skip in ('skip_layers: "rnn"', 'quant_skip_types: "LSTM"'):
        assert recurrent(Job(tmp_path, Net(), BEST + skip).create()) == []
    override = QUANT.replace("arq_retrain { }", "arq_retrain { dst_type: INT4 }").replace("\n", " ")
    text = f'{BEST}override_layer_configs {{ layer_name: "rnn" {override} }}'
    model = Job(tmp_path, Net(), text).create()
    layers = dict(compressed_layers(model))
    assert [layers[name].weight_quant.num_bits for name in PARTS] == [4] * 4
    assert layers["fc"].weight_quant.num_bits == 8


def test_shared_weights_and_other_inputs_keep_them_whole(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.LSTM(6, 8, num_layers=2)
            self.other.weight_ih_l0 = self.rnn.weight_ih_l0

    assert recurrent(Job(tmp_path, Tied(), BEST).create()) == []

    class Unbatched(Net):
        def forward(self, x):
            return super().forward(x[:, 0])

    assert recurrent(Job(tmp_path, Unbatched(), BEST).create()) == []


def test_the_quantisation_flow_writes_the_parts_and_the_profile(tmp_path):
    job = Job(tmp_path, Net(), BEST)
    file = str(tmp_path / "c.json")
    amct_ext.create_quant_retrain_config(file, job.net, job.x, str(job.config))
    text = Path(file).read_text()
    assert all(f'"{name}"' in text for name in PARTS) and '"profile":"BEST"' in text
    model = job.train(amct_ext.create_quant_retrain_model(file, job.net, str(job.record), job.x))
    assert recurrent(model) == PARTS
    torch.save(model.state_dict(), job.state)
    restored = amct_ext.restore_quant_retrain_model(file, job.net, str(job.record), job.x, str(job.state))
    assert torch.equal(restored.eval()(job.x), model.eval()(job.x))
    amct_ext.save_quant_retrain_model(file, model, str(job.record), str(tmp_path / "net"), job.x)
