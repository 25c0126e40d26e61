"""Which range a calibration takes: AMCT's, the robust one in its place, or what the configuration names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import amct_ext
from amct_ext import ops
from amct_ext.config.text import DataQuant
from amct_ext.layers.activation.calibration_data import ValueHistogram
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.ops.calibration_histogram import BINS

WORDS = "layer 'scores': AMCT's range"
QUANT = "retrain_data_quant_config {{ ulq_quantize {{ {} }} }} retrain_weight_quant_config {{ arq_retrain {{ }} }}"


def tails(count: int = 20_000) -> Tensor:
    x = torch.randn(count)
    x[:3] = torch.tensor([1e4, -3e3, 5e3])  # together more than all the others
    return x


def compressed(net: nn.Module, x: Tensor, folder: Path, data: str = "", more: str = "") -> nn.Module:
    config, record = folder / "c.cfg", folder / "r.txt"
    config.write_text(more + QUANT.format(data))
    return amct_ext.create_compressed_retrain_model(net, x, str(config), str(record)).train()


def quantizer(
    batch_num: int = 1, fixed_min: bool = False, histogram: bool = False, **data: object
) -> ActivationQuantizer:
    made = ActivationQuantizer(DataQuant(**data), fixed_min, batch_num, "scores", torch.device("cpu"))  # type: ignore[arg-type]
    if histogram:
        made.calibration.method = ValueHistogram()
    return made.train()


def clips(made: ActivationQuantizer) -> tuple[float, float]:
    return float(made.clip_min.detach()), float(made.clip_max.detach())


@pytest.mark.parametrize("histogram", [False, True])
@pytest.mark.parametrize("batch_num", [1, 3])
def test_outliers_do_not_decide_the_default(batch_num: int, histogram: bool, caplog: pytest.LogCaptureFixture) -> None:
    made = quantizer(batch_num, histogram=histogram)
    for i in range(batch_num):
        assert not caplog.records
        made.calibrate(tails())
        assert -10 < made.clip_min < -2 and 2 < made.clip_max < 10, i
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert WORDS in caplog.text and "range_search: AMCT" in caplog.text
    assert f"[{clips(made)[0]:.6g}, {clips(made)[1]:.6g}]" in caplog.text


@pytest.mark.parametrize("batch_num", [1, 3])
@pytest.mark.parametrize("x", ["normal", "relu", "tiny", "zeros", "half tiny", "softmax"])
def test_other_data_keep_the_range_of_amct(x: str, batch_num: int, caplog: pytest.LogCaptureFixture) -> None:
    """Also where no range would leave most values outside the code of zero."""
    normal = torch.randn(20_000)
    data = {
        "normal": normal,
        "relu": normal.relu(),
        "tiny": normal * 1e-12,
        "zeros": normal * 0,
        "half tiny": torch.cat([normal, normal * 1e-6, normal * 1e-6]),
        "softmax": torch.softmax(8 * normal.view(200, 100), 1).flatten(),
    }[x]
    guarded, plain = quantizer(batch_num), quantizer(batch_num, range_search="AMCT")
    for batch in data.chunk(batch_num):
        for made in (guarded, plain):
            made.calibrate(batch)
        assert clips(guarded) == clips(plain)
    assert clips(plain)[::-1] == tuple(float(v) for v in ops.search_clip_range(data)[2:])
    assert not caplog.records


def test_amct_keeps_its_range_by_name(caplog: pytest.LogCaptureFixture) -> None:
    made, x = quantizer(range_search="AMCT"), tails()
    made.calibrate(x)
    assert clips(made)[::-1] == tuple(float(v) for v in ops.search_clip_range(x)[2:])
    assert not caplog.records


@pytest.mark.parametrize("histogram", [False, True])
@pytest.mark.parametrize(
    "data", [{"range_search": "ABSOLUTE_ERROR"}, {"range_search": "PERCENTILE", "percentile": 99.0}]
)
def test_named_searches(data: dict[str, object], histogram: bool) -> None:
    """Of one batch and of three the same; the lower end is that of the data, or 0 where it is fixed."""
    x = torch.randn(3_000)
    one, three = quantizer(**data), quantizer(3, histogram=histogram, **data)
    one.calibrate(x)
    for batch in x.split(1_000):
        three.calibrate(batch)
    assert clips(one) == clips(three)
    for low, values in ((0.0, x.abs()), (float(nn.functional.gelu(x).min()), nn.functional.gelu(x))):
        made = quantizer(**data)
        made.calibrate(values)
        assert clips(made)[0] == pytest.approx(low, rel=1e-6)
    made = quantizer(fixed_min=True, **data)
    made.calibrate(x)
    assert clips(made)[0] == 0
    if "percentile" in data:
        assert clips(one)[1] == pytest.approx(float(x.abs().quantile(0.99)), rel=5e-2)


def test_an_evaluation_before_the_calibration_is_guarded_too() -> None:
    made, x = quantizer().eval(), tails()
    step = 2 * float((made(x)[3:] - x[3:]).abs().median())
    assert step < 0.1 and not made.calibrated


def test_data_without_signs_of_an_older_checkpoint_go_on() -> None:
    x = torch.randn(4_001)
    data = torch.zeros(2 * BINS + 1024, dtype=torch.int64)
    parts = data[: 2 * BINS].view(-1, 2), data[2 * BINS :].view(torch.float32).view(2, 1024)
    ops.range_histogram_(x[:2_000], *parts)
    found = ValueHistogram().statistics(ValueHistogram().add(data, x[2_000:]))
    whole = ValueHistogram().statistics(ValueHistogram().add(torch.zeros(0), x))
    assert found.amct_range(8) == whole.amct_range(8)
    for a, b in zip(found.histogram(), whole.histogram(), strict=True):
        assert torch.equal(a.sum(0), b.sum(0))
    high, low = ops.search_clip_range_wide(*found.histogram())
    assert 2.5 < high < 4.5 and -4.5 < low < -2.5


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU], ids=lambda cls: cls.__name__)
def test_recurrent_layers(rnn: type[nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = rnn(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x)[0]

    torch.manual_seed(0)
    net, x = Net(), tails(50 * 8 * 16).view(50, 8, 16)
    model = compressed(net, x, tmp_path)
    caplog.clear()
    model(x)
    assert caplog.text.count(WORDS) == 1
    assert model.scores.act_quant.clip_max < 10 and model.scores.hidden_quant.calibrated


def test_layers_that_share_an_input_and_compiled_graphs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.other = nn.Linear(100, 4), nn.Linear(100, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x) + self.other(x)

    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net, x = Net(), tails().view(200, 100)
        model = compressed(net, x, tmp_path)
        caplog.clear()
        (torch.compile(model, backend="eager") if compiled else model)(x)
        model.state_dict()
        assert caplog.text.count(WORDS) == 1
        found.append(clips(model.scores.act_quant))
    assert found[0] == found[1] and found[0][1] < 10
