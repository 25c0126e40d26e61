"""What kind of forward is under way: one that moves the state on, or one that repeats or only looks on."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_TRACERS = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)


def state_updates_disabled() -> bool:
    """Whether the present forward must not change any state.

    So for one that runs inside a backward (gradient checkpointing computes a part again, which has to give what it gave
    before), under a transform of torch.func, in a tracer or an exporter.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        in_backward()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or _in_tracer()
    )


def host_can_read(x: torch.Tensor) -> bool:
    """Whether the host can ask for a value now: not while a graph is made, nor on the meta device."""
    return not (torch.compiler.is_compiling() or x.is_meta or _in_tracer())


def _in_tracer() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        isinstance(mode, _TRACERS) for mode in _get_current_dispatch_mode_stack()
    )


def in_backward() -> bool:
    """Whether this thread is computing gradients just now."""
    return torch._C._current_graph_task_id() != -1


def autograd_context_key() -> tuple[bool, object]:
    """What tells a part of a forward that is run again by itself from the rest: gradients, hooks on saved tensors.

    Checkpointed parts have hooks of their own (or no gradients at first). A result made in one must not be used in
    another: the autograd graph of each has to be the same when it runs again.
    """
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled(), None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), None if hooks is None else hooks[0]
