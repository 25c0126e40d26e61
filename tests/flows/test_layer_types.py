"""Every layer type through a whole job: create, train, calibrate, restore, save, export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.models import small
from support.models.single_layer import SAMPLES
from torch import Tensor, nn

import amct_ext


class Net(nn.Module):
    """The layer behind a ReLU; of a recurrent layer the outputs without the state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(torch.relu(x) - 0.2)
        return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("config", ["quant", "learned"])
@pytest.mark.parametrize("kind", SAMPLES)
def test_a_job_from_create_to_export(kind: str, config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sample = SAMPLES[kind]
    net, x = Net(sample.build()), torch.randn(sample.shape)
    settings, record, state = (str(tmp_path / name) for name in ("c.cfg", "r.txt", "s.pth"))
    Path(settings).write_text(sample.settings + small.CONFIGS[config])
    model = amct_ext.create_compressed_retrain_model(net, x, settings, record).train()
    model(x)  # calibrates
    before = {name: value.detach().clone() for name, value in model.layer.named_parameters()}
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(
        not torch.equal(value, before[name]) for name, value in model.layer.named_parameters() if "weight" in name
    )
    want = model.eval()(x)
    torch.save(model.state_dict(), state)
    restored = amct_ext.restore_compressed_retrain_model(net, x, settings, record, state).eval()
    assert torch.equal(restored(x), want)
    amct_ext.save_compressed_retrain_model(restored, record, str(tmp_path / "m"), x)
    assert (tmp_path / "m_deploy_model.onnx").is_file()
    session = ort.InferenceSession(str(tmp_path / "m_fake_quant_model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want_values = want.detach().numpy()
    np.testing.assert_allclose(found, want_values, rtol=0, atol=0.02 * np.abs(want_values).max())
