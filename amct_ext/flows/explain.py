"""`explain`: a report on a compressed model, or on what create would make of a float one."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from amct_ext.common.inference_mode import outside_inference_mode
from amct_ext.common.wrapping import unwrap
from amct_ext.config.files import read_config
from amct_ext.explain.report import Explanation, report
from amct_ext.flows.build import Planner, compress


@outside_inference_mode
def explain(
    model: nn.Module, input_data: Any = None, config_defination: str | os.PathLike[str] | None = None
) -> Explanation:
    """Report for each layer whether it is quantised, pruned, 2:4 sparse or left alone, and the reason.

    ``model``: what a create or restore function returned. Or a float model, together with the ``input_data`` and the
    configuration (text or JSON) that create would get: then it is tried on a copy, and nothing is written. Layers that
    lose input channels because another layer lost outputs say so; `.export` says what is to be known of saving. Errors:
    ModelError (not a compressed model and no input_data and configuration), and those of the create functions.
    """
    inner = unwrap(model)
    if input_data is not None and config_defination is not None:
        inner = compress(inner, input_data, Planner.of(read_config(config_defination)), record_file="")
    return report(inner)
