"""sensitivity: errors of single layers, the choice for a budget, and that nothing of the model changes."""

import copy

import pytest
import torch
from support.jobs.any_job import AnyJob
from torch import nn

import amct_ext
from amct_ext import LayerSensitivity, Sensitivity
from amct_ext.errors import ModelError, StaleStateError

QUANT = "retrain_data_quant_config { ulq_quantize { } }\nretrain_weight_quant_config { arq_retrain { } }\n"
INT4 = QUANT.replace("arq_retrain { }", "arq_retrain { dst_type: INT4 }")
SPARSE = QUANT + "prune_config { n_out_of_m_pruner { l1_selective_prune { } } }\n"


def network():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("fine", nn.Conv2d(4, 8, 3, padding=1))
    net.add_module("act", nn.ReLU())
    net.add_module("coarse", nn.Conv2d(8, 8, 3, padding=1))
    net.add_module("pool", nn.AdaptiveAvgPool2d(2))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(32, 5))
    return net.eval(), torch.randn(8, 4, 6, 6)


def calibrated(tmp_path, text=QUANT, net=None, x=None):
    own, given = network()
    net, x = net or own, given if x is None else x
    model = AnyJob(tmp_path, text).create(net, x)
    amct_ext.calibrate(model, [x])
    return net, model, x


def test_the_error_is_that_of_the_network_with_one_layer_quantised(tmp_path):
    net, model, x = calibrated(tmp_path)
    report = amct_ext.sensitivity(model, [x, x])
    layers = {layer.name: layer for layer in report.layers}
    assert list(layers) == sorted(layers, key=lambda name: -layers[name].error)
    with torch.no_grad():
        right, seen = net(x).double(), model.eval()(x).double()
        only_head = model.head(net[:-1](x)).double()
    relative = lambda y: float((y - right).square().sum() / right.square().sum())  # noqa: E731
    assert report.error == pytest.approx(relative(seen), rel=1e-5)
    assert layers["head"].error == pytest.approx(relative(only_head), rel=1e-5)
    assert all(0 < layer.weight_error <= 2 * layer.error for layer in layers.values())
    macs = {"fine": 36 * 4 * 9 * 8, "coarse": 36 * 8 * 9 * 8, "head": 32 * 5}
    for name, count in macs.items():
        assert layers[name].share == pytest.approx(count / sum(macs.values()))


def test_the_masked_layer_counts_as_float(tmp_path):
    _, model, x = calibrated(tmp_path, SPARSE)
    assert amct_ext.sensitivity(model, [x]).error < 1e-3


def test_a_layer_of_outliers_is_the_most_sensitive_and_takes_the_budget(tmp_path):
    net, x = network()
    with torch.no_grad():
        net.coarse.weight[:, 0, 0, 0] *= 60
    _, model, x = calibrated(tmp_path, INT4, net, x)
    report = amct_ext.sensitivity(model, [x])
    assert report.layers[0].name == "coarse" and report.layers[0].remedy == "float"
    assert 'quant_skip_layers: "coarse"' in report.configuration(1.0)
    assert "coarse" in str(report) and f"{report.error:.2e}" in str(report)


def test_what_it_writes_is_a_configuration_that_helps(tmp_path):
    net, model, x = calibrated(tmp_path)
    report = amct_ext.sensitivity(model, [x])
    better = AnyJob(tmp_path, QUANT + report.configuration(0.9)).create(net, x)
    amct_ext.calibrate(better, [x])
    assert amct_ext.sensitivity(better, [x]).error < 0.7 * report.error


def test_choice_within_a_budget():
    layers = [
        LayerSensitivity("a", "Conv2d", 8, 8, 1.0, 0.9, 0.6),
        LayerSensitivity("b", "Conv2d", 8, 8, 0.5, 0.01, 0.1),
        LayerSensitivity("c", "Linear", 8, 4, 0.4, 0.01, 0.3),
        LayerSensitivity("d", "Linear", 8, 8, 0.0, 0.0, 0.0),
    ]
    report = Sensitivity(layers, 2.0, "error")
    assert [layer.remedy for layer in layers] == ["float", "INT16 input", "float", "float"]
    assert [layer.name for layer in report.choose(0.0)] == []
    assert [layer.name for layer in report.choose(0.4)] == ["b", "c"]
    assert {layer.name for layer in report.choose(1.0)} == {"a", "b", "c"}
    with pytest.raises(ValueError, match="0 to 1"):
        report.choose(10)


def test_the_loss_of_the_user(tmp_path):
    _, model, x = calibrated(tmp_path)
    labels = torch.arange(8) % 5
    loss = lambda network, batch: nn.functional.cross_entropy(network(batch[0]), batch[1])  # noqa: E731
    report = amct_ext.sensitivity(model, [(x, labels)], loss=lambda network, batch: float(loss(network, batch)))
    with torch.no_grad():
        net, _ = network()
        expected = loss(model.eval(), (x, labels)) - loss(net, (x, labels))
    assert report.measure == "loss" and report.error == pytest.approx(float(expected), abs=1e-6)


def test_recurrent_and_transposed_layers(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.rnn, self.fc = nn.ConvTranspose1d(4, 6, 2, 2), nn.LSTM(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(input=self.rnn(self.up(x).permute(2, 0, 1))[0])

    torch.manual_seed(0)
    _, model, x = calibrated(tmp_path, QUANT, Net().eval(), torch.randn(3, 4, 5))
    report = amct_ext.sensitivity(model, [x])
    layers = {layer.name: layer for layer in report.layers}
    macs = {"up": 15 * 4 * 6 * 2, "rnn": 30 * (6 + 8) * 32, "fc": 30 * 8 * 3}
    for name, count in macs.items():
        assert layers[name].share == pytest.approx(count / sum(macs.values()))
        assert 0 < layers[name].error < 1e-2


def test_nothing_of_the_model_changes(tmp_path):
    _, model, x = calibrated(tmp_path)
    model.train()
    before = copy.deepcopy(model.state_dict())
    record = (tmp_path / "record.txt").read_text()
    amct_ext.sensitivity(model, [x])
    assert model.training and (tmp_path / "record.txt").read_text() == record
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_errors(tmp_path):
    net, x = network()
    with pytest.raises(ModelError):
        amct_ext.sensitivity(net, [x])
    model = AnyJob(tmp_path, QUANT).create(net, x)
    with pytest.raises(StaleStateError, match="'fine' \\(3 in all\\) is not calibrated"):
        amct_ext.sensitivity(model, [x])
    amct_ext.calibrate(model, [x])
    with pytest.raises(TypeError, match="several batches"):
        amct_ext.sensitivity(model, x)
    with pytest.raises(ValueError, match="no batch"):
        amct_ext.sensitivity(model, [])
