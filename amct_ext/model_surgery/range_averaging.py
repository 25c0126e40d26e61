"""Clip ranges that the ranks of a job found on data of their own, averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amct_ext.common.ranks import all_reduce_sum_, is_distributed
from amct_ext.layers.activation.quantizer import ActivationQuantizer


@torch.no_grad()
def average_ranges(quantizers: Sequence[ActivationQuantizer]) -> None:
    """Give every rank the mean of the clips that ranks found in the forward just made, by one collective.

    Called on all ranks after each training forward until every calibration is finished. What is sent has a row for
    every quantiser, whichever layers a rank ran. Of each quantiser counts, if any rank has it:

    1. the robust ranges of all ranks, where one rank had to replace AMCT's;
    2. ranges of finished calibrations; the calibration is then finished on all ranks;
    3. ranges of one batch.
    """
    if not is_distributed() or all(quantizer.calibrated and not quantizer.search_stage for quantizer in quantizers):
        return
    first = quantizers[0].clip_max
    dtype = torch.float64 if any(q.clip_max.dtype == torch.float64 for q in quantizers) else torch.float32
    # Of each quantiser: clips that are final, that are not, that are robust; how many ranks, and the sums of the clips.
    table = torch.zeros(len(quantizers), 3, 3, dtype=dtype, device=first.device)
    for row, quantizer in zip(table, quantizers, strict=True):
        if quantizer.search_stage:
            found = row[0 if quantizer.search_stage == "final" else 1]
            found[0] = 1
            found[1:] = torch.stack([quantizer.clip_max, quantizer.clip_min])
        robust = None if quantizer.found_range is None else quantizer.found_range.robust
        if robust is not None and quantizer.found_range is not None and quantizer.found_range.replaced is not None:
            row[2, 0] = quantizer.found_range.replaced
            row[2, 1:] = torch.stack(robust)
        quantizer.search_stage = ""
        if not quantizer.candidates:
            quantizer.log_range()
    all_reduce_sum_(table)
    counts = table[..., 0].tolist()
    for (finished, provisional, replaced), row, quantizer in zip(counts, table, quantizers, strict=True):
        if not finished and not provisional:
            continue
        clips = row[0 if finished else 1, 1:] / (finished or provisional)
        if replaced:  # AMCT's range is too wide on a rank: all take what is robust on their data
            clips = row[2, 1:] / finished
        quantizer.clip_max.copy_(clips[0])
        quantizer.clip_min.copy_(clips[1])
        if finished:
            quantizer.prev_clip_max.copy_(clips[0])
            quantizer.prev_clip_min.copy_(clips[1])
            quantizer.finish_calibration()
