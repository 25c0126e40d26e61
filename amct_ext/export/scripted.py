"""TorchScript parts of a model, in a form that torch.export can capture: their operators, weights as constants."""

from __future__ import annotations

import torch
from torch import nn

from amct_ext.common.references import replace_modules


class _ScriptedWrapper(nn.Module):
    """Calls a scripted module without showing its parameters, which torch.export does not accept."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        super().__init__()
        # The compiled method itself: on the module, torch.export puts a function of its own in the way.
        self.compiled = module._c._get_method("forward")

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.compiled(*args, **kwargs)


def wrap_scripted(model: nn.Module) -> nn.Module:
    """Put a module that can be captured in the place of each scripted one, in place; returns the model."""
    scripted: dict[nn.Module, nn.Module] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) and module not in inside:
            inside.update(module.modules())
            scripted[module] = _ScriptedWrapper(module)
    return replace_modules(model, scripted)
