"""Running statistics of BatchNorm, estimated anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_ext.common.validation import check_types
from amct_ext.common.wrapping import unwrap
from amct_ext.flows.calibrate import check_batches
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.run import in_mode


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Give the BatchNorm layers of a model running statistics of its own, for one that was pruned, say.

    Removing channels changes what every layer behind them sees. Without this, an evaluation before the next training
    uses statistics of the whole network.

    ``model``: compressed or not. ``batches``: several of what the model is called with, in a form that create takes as
    ``input_data``, on its device; of the size used in training, and as many as give stable means.

    State changed: ``running_mean`` and ``running_var``, in place, to the plain mean over the batches, and
    ``num_batches_tracked``. BatchNorm normalises by each batch meanwhile. The rest of the model is in eval mode, keeps
    its mode afterwards and is not changed: no calibration, no 2:4 step. Layers that keep no statistics are left alone.

    Errors: TypeError (one batch instead of several), ValueError (no batch); the old statistics stay where anything
    fails. Source: the usual re-estimation after pruning (Li et al. 2020, EagleEye) and weight averaging
    (`torch.optim.swa_utils.update_bn`).
    """
    check_types(model=(model, nn.Module))
    check_batches(batches)
    inner = unwrap(model)
    norms = [norm for norm in inner.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    before = [(held, held.clone()) for norm in norms for held in norm.buffers(recurse=False)]
    count = 0
    try:
        with in_mode(inner, training=False):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean
                norm.training = True
            for batch in batches:
                parse_inputs(inner, batch).call(model)
                count += 1
        if norms and not count:
            raise ValueError("batches holds no batch, so there is nothing to estimate statistics from")
    except BaseException:
        for held, values in before:
            held.copy_(values)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
