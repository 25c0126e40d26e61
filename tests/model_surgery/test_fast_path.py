"""Torch's encoders and decoders run layer by layer, in training and in every evaluation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks.onnx_run import run_onnx
from support.jobs.any_job import AnyJob, off
from support.models import small
from support.models.net_of_function import Net
from support.models.small import SPARSE_QUANT, linear
from torch import nn

import amct_ext


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_encoder_layers_run_in_every_evaluation(tmp_path: Path, norm_first: bool, mode: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    net, x = nn.Sequential(layer, linear(16, 4)), torch.randn(8, 5, 16)
    job = AnyJob(tmp_path, SPARSE_QUANT)
    model = job.calibrated(net, x)
    with mode():
        plain = model.eval()(x)
    assert off(plain, model(x).detach()) < 1e-5
    assert off(run_onnx(job.save(model, x)[0], x), plain.clone()) < 0.05
    assert layer.activation_relu_or_gelu == 1  # the caller's


def test_decoders_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    data = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    model = AnyJob(tmp_path, small.QUANT).calibrated(net, data).eval()
    with torch.no_grad():
        plain = model(*data)
    assert off(plain, model(*data).detach()) < 1e-5
    report = amct_ext.explain(model)
    assert report["encoder.layers.0.self_attn.out_proj"].quantised  # of self-attention; see test_attention
    assert "without calling" in report["decoder.layers.0.multihead_attn.out_proj"].not_quantised
    assert report["decoder.layers.0.linear1"].quantised


def test_encoder_with_a_padding_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    net = Net(lambda m, x, pad: m.head(m.encoder(x, src_key_padding_mask=pad)), encoder=encoder, head=linear(16, 4))
    x, pad = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    pad[0, 3:] = pad[1, 4:] = True
    job = AnyJob(tmp_path, small.QUANT)
    with caplog.at_level(logging.INFO, "amct_ext"):
        model = job.calibrated(net, (x, pad))
    assert "enable_nested_tensor" in caplog.text
    with torch.no_grad():
        seen, expected = model.eval()(x, pad), net.eval()(x, pad)
    assert off(seen[~pad], expected[~pad]) < 0.1
    assert encoder.enable_nested_tensor
    assert off(run_onnx(job.save(model, (x, pad))[0], x, pad)[~pad], seen[~pad]) < 0.05
